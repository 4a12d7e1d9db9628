"""The commands of `cohort`, one module each."""
