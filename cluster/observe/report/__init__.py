"""The page of a run: `cohort report`."""
