"""Frozen diffusion transformers: what they are, where their weights lie, how a picture is put through."""
