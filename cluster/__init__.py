"""Where everything runs, and in what order: config, loop, placement, tracking, commands."""
