"""What surrounds the steps of a run: checkpoints, and advice while it goes."""
