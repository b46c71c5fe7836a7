"""A run: its folder, its checkpoints, its logs, and one attempt at it."""
