"""Prompts and words as vectors: from the text encoders, or from what they gave in a pass before."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from mmdiff_cache.errors import BackboneError, ConfigError

PROMPT_CACHE = 64
"""Encoded prompts kept; one of FLUX.1-dev takes 4 MiB."""


class TextSource(ABC):
    """Gives a prompt's vectors and a word's; the latest prompts are kept."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def prompt(self, prompt: str) -> tuple[Float[Tensor, "1 S E"], Float[Tensor, "1 E_pooled"]]:
        """One prompt a pass, so that a kept one equals a new one bit for bit."""
        if prompt not in self._kept:
            encoded = self._encode(prompt)
            if len(self._kept) == PROMPT_CACHE:
                self._kept.pop(next(iter(self._kept)))
            self._kept[prompt] = encoded
        return self._kept[prompt]

    @abstractmethod
    def word(self, word: str) -> Float[Tensor, " E"]:
        """The mean of the T5 vectors of a word's own pieces. Raises ConfigError for a word without any.

        ConceptAttention takes a word's first piece, which reads 'skyscraper' as 'sky'. The mean is the same
        thing wherever a word is one piece.
        """

    @abstractmethod
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """One prompt: the vectors of its tokens [1 S E] and the pooled one [1 E_pooled]."""


class EncoderText(TextSource):
    """The text encoders of a pipeline, which may hold nothing else."""

    def __init__(self, pipeline: Any, *, device: torch.device, text_length: int) -> None:
        super().__init__()
        self._pipeline, self.device, self._text_length = pipeline, device, text_length

    @torch.inference_mode()
    def word(self, word: str) -> Float[Tensor, " E"]:
        place = self._place(word)
        count = place.stop - place.start
        if count == 0:
            raise ConfigError(f"concept {word!r} has no token in the text encoder")
        if count >= self._text_length:  # the end marker takes one
            raise ConfigError(
                f"concept {word!r} has {count} tokens, so text_length must be at least {count + 1}, got "
                f"{self._text_length}"
            )
        pieces = self.prompt(word)[0][0, place]
        return pieces.to(torch.float32).mean(dim=0).to(pieces.dtype)

    @abstractmethod
    def _place(self, word: str) -> slice:
        """Where a word's own pieces stand in its prompt's tokens, without the end marker."""


class SavedText(TextSource):
    """Reads what `save_text` wrote."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        super().__init__()
        self._folder, self._device = folder, device

    def word(self, word: str) -> Float[Tensor, " E"]:
        return self._load("word", word)["vector"]

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        saved = self._load("prompt", prompt)
        return saved["tokens"], saved["pooled"]

    def _load(self, kind: str, text: str) -> dict[str, Tensor]:
        file = _file(self._folder, kind, text)
        if not file.exists():
            raise BackboneError(
                f"the {kind} {text!r} was not encoded before the text encoders left; run again"
            )
        return load_file(file, device=str(self._device))


def save_text(text: TextSource, folder: Path, *, prompts: Iterable[str], words: Iterable[str]) -> None:
    """Encode each of these once and keep it in a file of its own, for `SavedText`."""
    for prompt in prompts:
        tokens, pooled = text.prompt(prompt)
        _file(folder, "prompt", prompt).write_bytes(save({"tokens": tokens, "pooled": pooled}))
    for word in words:
        _file(folder, "word", word).write_bytes(save({"vector": text.word(word)}))


def _file(folder: Path, kind: str, text: str) -> Path:
    return folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
