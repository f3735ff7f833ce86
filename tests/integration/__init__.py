"""Real processes, killed and paused, and the books checked afterwards. `world.py` is where to begin."""
