"""Frozen discriminative encoders, whose features stand beside those of the diffusion transformer."""
