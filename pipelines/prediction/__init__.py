"""Frames come out: rollouts in batches, clips, pictures."""
