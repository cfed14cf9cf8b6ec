"""Pixels to the store of latents, here or on a cluster, and verification against pixels."""
