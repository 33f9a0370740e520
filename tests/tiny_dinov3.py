"""A DINOv3ViTModel of the real class with random weights, saved as the hub has the real one."""

import json
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
CHANNELS, BLOCKS, PATCH = 24, 4, 16
LAYERS = ("1", "3")
"""Blocks {2, 11} of 12 are at these depths of 4."""


def save_tiny_dinov3(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Four blocks of 24 channels, four registers; weights large enough that every block matters."""
    values = {
        "hidden_size": CHANNELS,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "num_register_tokens": 4,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(seed)
    DINOv3ViTModel(DINOv3ViTConfig(**values)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder
