"""Stage 1: pixels to latents. Architectures, losses, video sources."""
