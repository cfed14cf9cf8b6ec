"""Batches for training, in three tiers with one interface."""
