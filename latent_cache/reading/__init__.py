"""Reading a store: checked, lazily, from paths and URLs."""
