"""Runs that travel: released runs, and pushing and pulling them to and from folders, S3 and the hub."""
