"""What every run needs: checkpoints, logs, progress, seeds and signals."""
