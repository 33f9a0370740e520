"""The corpus's captions as token ids, and the draw of what a training step reads of them."""

from dataclasses import dataclass

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor

from mmdiff_cache.flux_scenes.corpus import Prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptMix:
    """Shares of the steps' prompts; the rest are full captions."""

    empty: float = 0.10
    scene: float = 0.05  # ground and time alone
    capitalised: float = 0.10  # of the captions: first letter in upper case


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Token ids of some prompts, padded as FluxPipeline pads them: [B length] each."""

    words: Tensor  # for the T5 encoder
    pooled: Tensor  # for the CLIP encoder

    def __getitem__(self, index: Tensor) -> "Tokens":
        return Tokens(words=self.words[index].long(), pooled=self.pooled[index].long())

    def to(self, device: torch.device) -> "Tokens":
        """The same ids on another device."""
        return Tokens(words=self.words.to(device), pooled=self.pooled.to(device))


class PromptBank:
    """Every scene's caption, also capitalised, its ground-and-time prompt, and the empty prompt as tokens."""

    def __init__(self, pipeline: FluxPipeline, prompts: list[Prompts], mix: PromptMix) -> None:
        captions = [one.caption for one in prompts]
        texts = [*captions, *map(_capitalise, captions), *(one.scene for one in prompts), ""]
        self._tokens = tokenise(pipeline, texts)
        self._scenes = len(prompts)
        self._mix = mix

    def draw(self, scenes: Tensor, generator: torch.Generator) -> Tokens:
        """Tokens for the scenes with these numbers, each of a kind drawn by the mix."""
        kind = torch.rand(len(scenes), generator=generator)
        upper = torch.rand(len(scenes), generator=generator) < self._mix.capitalised
        rows = scenes + self._scenes * upper
        rows = torch.where(kind < self._mix.empty + self._mix.scene, scenes + 2 * self._scenes, rows)
        rows = torch.where(kind < self._mix.empty, 3 * self._scenes, rows)
        return self._tokens[rows]

    def empty(self, count: int) -> Tokens:
        """The empty prompt, `count` times."""
        return self._tokens[torch.full((count,), 3 * self._scenes)]

    def captions(self, scenes: Tensor) -> Tokens:
        """The captions of the scenes with these numbers."""
        return self._tokens[scenes]


def tokenise(pipeline: FluxPipeline, texts: list[str]) -> Tokens:
    """Token ids as FluxPipeline makes them: padded to the tokenizers' lengths, cut there if longer."""
    found = [
        tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)[
            "input_ids"
        ]
        for tokenizer in (pipeline.tokenizer_2, pipeline.tokenizer)
    ]
    words, pooled = (torch.tensor(ids, dtype=torch.int16) for ids in found)
    return Tokens(words=words, pooled=pooled)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
