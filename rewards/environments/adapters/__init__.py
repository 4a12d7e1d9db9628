"""Environments of other packages.

- `mcp`: tools of MCP servers.
- `openenv`: environments of OpenEnv.
- `skyrl_gym`: environments of SkyRL-gym.

Each module imports its package when it is loaded, so this one imports none of them.
"""
