"""Bytes from outside: data sets, downloads, archives, summaries, frame folders."""
