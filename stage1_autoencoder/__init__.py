"""Stage 1: pixels to latents. Architectures, losses and the sources of frames."""
