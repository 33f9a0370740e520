"""Where a table takes place: data sets, backbones, encoder, seeds and lengths of training.

The paper's world has its data sets, FLUX.1-dev, SD3.5 and DINOv3 ViT-B/16; the small one rendered scenes for
all tasks and the bundled flux-scenes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdiff_cache.backbones.info import (
    PAPER_SINGLE_BLOCKS,
    PAPER_SINGLE_LAYERS,
    TIMESTEPS,
    same_depth,
)
from mmdiff_cache.backbones.registry import BACKBONES, describe
from mmdiff_cache.config import TrainConfig
from mmdiff_cache.datasets.registry import DATASETS, find_dataset
from mmdiff_cache.encoders.registry import ENCODERS, describe_encoder
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.table import METRICS, Training

PAPER_DATASETS: Mapping[str, str] = {"segmentation": "voc", "saliency": "duts", "depth": "nyu"}
PAPER_ENCODER = "dinov3-vitb16"
FLUX, SD3 = "FluxPipeline", "StableDiffusion3Pipeline"
PAPER_BACKBONES: Mapping[str, str] = {FLUX: "flux-dev", SD3: "sd35-large"}
SMALL, SMALL_BACKBONE = "scenes", "flux-scenes"
SEEDS = (0, 1, 2)
CLEAREST = (min(TIMESTEPS),)
"""The paper's "t = 0"."""
PAPER_DEFAULTS: Mapping[str, Any] = {"precision": "bfloat16"}
SMALL_ENDS = 1
"""Of the four layers at the paper's relative depths the middle two: the paper reads every eleventh block, and
flux-scenes has twelve in all. Of two pairs these were better on held-out samples (docs/experiments.md).
"""
SMALL_STEPS: Mapping[str, int] = {"segmentation": 1440, "saliency": 480, "depth": 720}
SMALL_DEFAULTS: Mapping[str, Any] = {
    "precision": "float32",  # few CPUs compute faster in bfloat16
    "batch_size": 4,
    "learning_rate": 3e-3,
    "decoder_rate": 1.0,
    "checks": 5,
}
SMALL_LIMIT = 512
"""Scenes a split, where it has as many."""
SMALL_WIDTH = 4
"""C / D, as in the paper: 3072 / 768."""
QUICK_STEPS, QUICK_LIMIT, QUICK_SEEDS = 2, 16, (0,)
QUICK_DEFAULTS: Mapping[str, Any] = {"batch_size": 2, "holdout": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What a recipe's `table(world)` builds its rows in."""

    name: str
    datasets: Mapping[str, str]
    """By task."""
    backbone: str
    """What features are taken from: the FLUX, unless a row puts another in its place."""
    sd3: str
    """The Stable Diffusion 3.5 (Paper: App. G)."""
    encoder: str
    seeds: tuple[int, ...]
    steps: Mapping[str, int] = field(default_factory=dict[str, int])
    """By task; one that is not there trains its default number of epochs."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of every training that a row leaves open."""
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """`--set` assignments, which come last."""
    limit: int | None = None
    """The first N samples of every split; None for all."""
    roots: Mapping[str, str] = field(default_factory=dict[str, str])
    """Folders of the data sets' files, by data set."""
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Rule of the prompts by data set; empty ones where there is none."""
    ends: int = 0
    """Of the backbone's layers so many are left out at either end, where any are left then."""
    shape: str | None = None
    """Whose layers and timesteps are read; the backbone's own by default."""

    def training(self, task: str, **choices: Any) -> Training:
        """A model for one task; `choices` are fields of its configuration.

        Layers, timesteps and noise draw are the world's where `choices` have none: nothing is left to what a
        store happens to hold.
        """
        return self._training((task,), choices)

    def trainings(self, **choices: Any) -> tuple[Training, ...]:
        """The same for every task, a model each."""
        return tuple(self._training((task,), choices) for task in self.datasets)

    def together(self, *tasks: str, **choices: Any) -> Training:
        """One model for several tasks, of which no picture has two labels. Paper: App. C.

        Where the steps of each task are known, it has as many as alone.
        """
        alone = len({self.datasets[task] for task in tasks}) == 1
        known = len(tasks) > 1 and all(task in self.steps for task in tasks)
        mixing = tuple(float(self.steps[task]) for task in tasks) if known else None
        return self._training(tasks, {"disjoint": alone and len(tasks) > 1, "mixing": mixing, **choices})

    @property
    def double_layers(self) -> tuple[str, ...]:
        """Double-stream blocks at the relative depths of the paper's single-stream blocks {4, 15, 26, 37}."""
        count = describe(self.backbone).architecture.double_blocks
        found = same_depth(PAPER_SINGLE_LAYERS, PAPER_SINGLE_BLOCKS, count)
        return self._between(tuple(f"double.{n}" for n in found))

    @property
    def encoder_name(self) -> str:
        """What the encoder's features are called in a store."""
        return self.encoder if self.encoder in ENCODERS else describe_encoder(self.encoder).name

    def share(self, tasks: int) -> int | None:
        """Samples for each of so many tasks that divide one training split; None where each has its own."""
        if len(set(self.datasets.values())) > 1:
            return None
        there = find_dataset(next(iter(self.datasets.values()))).splits.get("train")
        known = [count for count in (self.limit, there) if count is not None]
        return max(1, min(known) // tasks) if known else None

    def with_control(self, backbone: str) -> "World":
        """The same with another backbone of the same shape, which may not be there yet."""
        return replace(self, backbone=backbone, shape=self.backbone)

    def exchanged(self, dataset: str, other: str) -> "World":
        """The same with another data set in the place of one; the same world where it does not have that."""
        found = {task: other if name == dataset else name for task, name in self.datasets.items()}
        return replace(self, datasets=found)

    def _training(self, tasks: Sequence[str], choices: Mapping[str, Any]) -> Training:
        steps = [self.steps.get(task) for task in tasks]
        known = [count for count in steps if count is not None]
        values = {
            **self.defaults,
            **self._read(choices.get("source")),
            "task": "+".join(tasks),
            "steps": sum(known) if len(known) == len(steps) else None,
            **choices,
        }
        return Training(
            config=TrainConfig.from_json(values).override(self.settings),
            datasets=tuple(self.datasets[task] for task in tasks),
            backbone=self.backbone,
        )

    def _between(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        return layers[self.ends : len(layers) - self.ends] or layers

    def _read(self, source: str | None) -> dict[str, Any]:
        """What is read of a store; an encoder has layers of its own, and no timesteps."""
        if source == "discriminative":
            return {}
        info = describe(self.shape or self.backbone)
        return {
            "layers": self._between(info.layers),
            "timesteps": info.timesteps,
            "variants": (0,),
        }


def make_world(
    *,
    datasets: Sequence[str] = (),
    backbones: Sequence[str] = (),
    encoder: str | None = None,
    roots: Mapping[str, str] | None = None,
    prompts: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
    quick: bool = False,
    settings: Mapping[str, str] | None = None,
) -> World:
    """The paper's world, or the small one where the data set is `scenes`, with what else is chosen.

    `datasets` are names, or `task=name` for one task; each of `backbones` takes the place of that of its
    family. `quick` trains a few steps on a few samples. `settings` are those of `--set`. Raises ConfigError
    for a task, data set, backbone or field that there is not.
    """
    chosen = _datasets(datasets)
    small = set(chosen.values()) == {SMALL}
    families = {**PAPER_BACKBONES, **({FLUX: SMALL_BACKBONE} if small else {})}
    families |= {describe(name).architecture.pipeline: name for name in backbones}
    if encoder is not None:
        describe_encoder(encoder)
    steps = dict.fromkeys(METRICS, QUICK_STEPS) if quick else dict(SMALL_STEPS) if small else {}
    for option, named in (("--data-root", roots), ("--prompts", prompts)):
        for name in named or {}:
            if name not in DATASETS:
                raise ConfigError(f"{option} is for data sets, {', '.join(DATASETS)}; got {name!r}")
    TrainConfig(task="").override(settings or {})
    width = max(8, describe(families[FLUX]).channels // SMALL_WIDTH // 8 * 8)
    return World(
        name=_name(chosen, families, limit=limit, quick=quick),
        datasets=chosen,
        backbone=families[FLUX],
        sd3=families[SD3],
        encoder=encoder or PAPER_ENCODER,
        seeds=tuple(seeds) if seeds else QUICK_SEEDS if quick else SEEDS,
        steps=steps,
        defaults={**(SMALL_DEFAULTS if small else PAPER_DEFAULTS), **(QUICK_DEFAULTS if quick else {})},
        settings={**({"aggregator.width": str(width)} if small else {}), **(settings or {})},
        limit=limit or (QUICK_LIMIT if quick else SMALL_LIMIT if small else None),
        roots=dict(roots or {}),
        prompts=dict(prompts or {}),
        ends=SMALL_ENDS if small else 0,
    )


def _datasets(asked: Sequence[str]) -> dict[str, str]:
    """The data set of every task. Raises ConfigError for a task that no table has."""
    found = dict(PAPER_DATASETS)
    for text in asked:
        task, equals, name = text.partition("=")
        if not equals:
            found = dict.fromkeys(found, text)
        elif task in found:
            found[task] = name
        else:
            raise ConfigError(f"--dataset takes NAME or TASK=NAME with {', '.join(found)}, got {text!r}")
    for name in found.values():
        find_dataset(name)
    return found


def _name(
    datasets: Mapping[str, str], backbones: Mapping[str, str], *, limit: int | None, quick: bool
) -> str:
    """What tells this world's results from another's, as a part of a folder's name."""
    paper = datasets == PAPER_DATASETS
    names = ["paper"] if paper else list(dict.fromkeys(datasets.values()))
    for family, name in backbones.items():
        if name != PAPER_BACKBONES[family]:
            names.append(name if name in BACKBONES else Path(describe(name).source).name)
    return "-".join([*names, *([f"limit{limit}"] if limit else []), *(["quick"] if quick else [])])
