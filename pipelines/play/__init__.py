"""The page on which one plays with a trained run."""
