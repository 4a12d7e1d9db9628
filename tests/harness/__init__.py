"""The fast harness: whole runs of the product in one process. Start at `world.py`."""
