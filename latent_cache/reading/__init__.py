"""Reading a store: lazily and with checks, from paths and URLs."""
