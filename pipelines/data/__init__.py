"""Bytes from outside: data sets, downloads, archives, surveys, frame folders."""
