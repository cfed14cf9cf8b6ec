"""The command line: one file per CLI word."""
