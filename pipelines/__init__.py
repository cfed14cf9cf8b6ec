"""What a user runs: one file a command, the configuration, the Python API and the metrics."""
