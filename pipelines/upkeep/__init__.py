"""What is on this machine and in the working folder: a description for bug reports, and what can be removed."""
