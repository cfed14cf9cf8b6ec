"""Training batches from a store, in three tiers with one interface, and clips for other trainings."""
