"""Stage 2: flow matching on latents. Path, vector field, conditioning, solvers, rollout. Knows no pixel."""
