"""What a user runs: one file a command, the configuration, the Python API and the metrics."""

__version__ = "0.1.0"
