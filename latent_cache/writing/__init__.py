"""Writing a store: whole chunks, one writer each, flushed."""
