"""`cohort check`: what can go wrong with a run, found before anything expensive starts."""
