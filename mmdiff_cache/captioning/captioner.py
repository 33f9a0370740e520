"""A vision-language model that describes pictures; by default Gemma-3-4B, as in the paper (Sec. 4).

Any model that transformers loads for image and text, and that has a chat template, can take its place.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmdiff_cache.backbones.pipeline import DTYPES, choose_device
from mmdiff_cache.errors import BackboneError, ConfigError
from mmdiff_cache.hub import find_snapshot, hash_files, is_repository, model_files
from mmdiff_cache.pretrained import load_whole, quiet_loading

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "Describe this image in one or two plain sentences: what is in it, what it looks like, "
    "where things are, and the background. Write the description and nothing else."
)
"""What the model is asked, the same for every picture; the paper does not give its own."""
HUB = "https://huggingface.co"
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja")
"""The files of a repository that are needed."""


class Captioner:
    """Describes pictures by greedy decoding: the same picture gives the same words."""

    def __init__(self, model: Any, processor: Any, *, max_tokens: int) -> None:
        self._model, self._processor, self._max_tokens = model, processor, max_tokens

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[str]:
        """One line of text for each picture [H W 3], of any size."""
        inputs = self._processor.apply_chat_template(
            [_question(image) for image in images],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, dtype=self._model.dtype)
        written = self._model.generate(
            **inputs, max_new_tokens=self._max_tokens, do_sample=False, top_k=None, top_p=None
        )
        asked = inputs["input_ids"].shape[1]
        texts: list[str] = self._processor.batch_decode(written[:, asked:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def load_captioner(
    folder: Path, *, device: str, dtype: Literal["float32", "bfloat16"], max_tokens: int
) -> Captioner:
    """Load model and processor. Raises BackboneError when they cannot be used."""
    chosen = choose_device(device)
    logger.info("loading %s: %s, %s", folder, dtype, chosen)
    try:
        with quiet_loading():
            processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise BackboneError(f"the model in {folder} cannot be loaded: {error}") from error
    if getattr(processor, "chat_template", None) is None:
        raise BackboneError(f"the model in {folder} has no chat template, so it takes no instructions")
    model = load_whole(AutoModelForImageTextToText, folder, folder.name, dtype=DTYPES[dtype])
    return Captioner(model.to(chosen).eval(), processor, max_tokens=max_tokens)


def locate_model(model: str) -> Path:
    """The folder of a model's files: a folder, the local copy of a repository, or a new one from the hub.

    Raises ConfigError for what is neither folder nor repository, BackboneError when files are missing.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if missing := missing_weights(folder):
            raise BackboneError(f"the files of the model are incomplete: {folder / missing} is missing")
        return folder
    if not is_repository(model):
        raise ConfigError(
            f"model must be a folder or a repository such as google/gemma-3-4b-it, got {model!r}"
        )

    def refuse(reason: str) -> BackboneError:
        return BackboneError(
            f"the weights of {model} are not on this machine ({reason}). One of these helps:\n"
            f"  accept the licence (Gemma Terms of Use) at {HUB}/{model}, then: hf auth login\n"
            "  --model FOLDER   a copy of it, or another model for image and text\n"
            "  mmdiff-cache extract --prompts empty   extract without captions, as is the default"
        )

    return find_snapshot(model, PATTERNS, missing_weights, refuse, download=True)


def missing_weights(folder: Path) -> str | None:
    """The first file that a model of transformers needs and this folder lacks; None when all are there."""
    files = ("config.json", *model_files(folder, "model"))
    return next((name for name in files if not (folder / name).is_file()), None)


def hash_model(folder: Path) -> str:
    """SHA-256 (hex) that tells this model's captions from another's."""
    names = {file.name for pattern in PATTERNS for file in folder.glob(pattern)}
    return hash_files(folder, sorted(names))


def _question(image: NDArray[np.uint8]) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": INSTRUCTION}]
    return [{"role": "user", "content": content}]
