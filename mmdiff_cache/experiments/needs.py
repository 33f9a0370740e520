"""What trainings read, and the fewest stores that hold it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.datasets.concepts import PRESETS
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.table import Training
from mmdiff_cache.experiments.world import CLEAREST, World
from mmdiff_cache.loader.inputs import CROSS_ATTENTION, NO_CONCEPTS
from mmdiff_cache.tasks import find_task
from mmdiff_cache.training.unified import VOCABULARY


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What trainings read of one data set's store of one backbone."""

    dataset: str
    backbone: str
    layers: frozenset[str]
    timesteps: frozenset[float]
    draws: int
    vocabularies: frozenset[str]
    encoders: frozenset[str]
    """Names or folders, as `extract` takes them."""
    cross_attention: bool

    @property
    def maps(self) -> int:
        """Maps of hidden states a sample."""
        return len(self.layers) * len(self.timesteps) * self.draws

    def joined(self, other: "Need") -> "Need":
        """What holds both."""
        return replace(
            self,
            layers=self.layers | other.layers,
            timesteps=self.timesteps | other.timesteps,
            draws=max(self.draws, other.draws),
            vocabularies=self.vocabularies | other.vocabularies,
            encoders=self.encoders | other.encoders,
            cross_attention=self.cross_attention or other.cross_attention,
        )

    def holds(self, other: "Need") -> bool:
        """Whether all of another is in it."""
        same = (self.dataset, self.backbone) == (other.dataset, other.backbone)
        return same and self.joined(other) == self


def needs_of(training: Training, world: World) -> tuple[Need, ...]:
    """What a training reads, one need for each of its tasks, in their order.

    Raises ConfigError for a vocabulary that has no preset, or a backbone that is not known.
    """
    config, info = training.config, describe(training.backbone)
    of_backbone = config.source == "hidden_states"
    several = len(training.tasks) > 1
    needs: list[Need] = []
    for task, dataset in zip(training.tasks, training.datasets, strict=True):
        words = config.concepts or (VOCABULARY if several else find_task(task).vocabulary)
        if words not in (NO_CONCEPTS, CROSS_ATTENTION, *PRESETS):
            raise ConfigError(f"concepts {words!r} are not known; there are {', '.join(PRESETS)}")
        # other sources are stored with any features: those that a training names, else the least of them
        layers = config.layers or (info.layers if of_backbone else info.layers[-1:])
        timesteps = config.timesteps or (info.timesteps if of_backbone else CLEAREST)
        info.check_layers(layers)
        needs.append(
            Need(
                dataset=dataset,
                backbone=training.backbone,
                layers=frozenset(layers),
                timesteps=frozenset(timesteps),
                draws=1 + max(config.variants or (0,)),
                vocabularies=frozenset((words,)) - {NO_CONCEPTS, CROSS_ATTENTION},
                encoders=frozenset(
                    world.encoder if e == world.encoder_name else e for e in config.discriminative
                ),
                cross_attention=words == CROSS_ATTENTION,
            )
        )
    return tuple(needs)


def fewest(needs: Iterable[Need]) -> tuple[Need, ...]:
    """Stores that hold all needs, joined where that takes no more maps than apart.

    A store has all of its layers at all of its timesteps: four double-stream blocks at one t, put beside four
    single-stream blocks at four, would be stored at all four.
    """
    found: list[Need] = []
    for need in sorted(dict.fromkeys(needs), key=lambda need: -need.maps):
        for number, other in enumerate(found):
            whole = other.joined(need)
            same = (other.dataset, other.backbone) == (need.dataset, need.backbone)
            if same and whole.maps <= other.maps + need.maps:
                found[number] = whole
                break
        else:
            found.append(need)
    return tuple(found)


def store_for(need: Need, stores: Mapping[Need, Path]) -> Path | None:
    """The store that holds a need, the smallest of several; None where there is none."""
    holding = [whole for whole in stores if whole.holds(need)]
    return stores[min(holding, key=lambda whole: whole.maps)] if holding else None
