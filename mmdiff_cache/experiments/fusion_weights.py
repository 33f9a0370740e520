"""Do the aggregator's weights lean to cleaner timesteps at edges? What each timestep counts there and inside.

The paper claims that smooth regions gain from the consistency of early (noisy) timesteps and boundaries need
the precision of late ones (Sec. 3.1). So the mean t of a token, sum over T of w_t t, should be smaller at
edges than inside. Each picture gives its mean weights over its tokens at edges and over those inside; then
the mean over pictures, and the paired bootstrap of edges minus inside. Pictures without both are left out.

Beside it stands the same at the edges of another picture (shuffled): edges lie more often in the middle, so
weights that know a token's place and nothing of the picture differ there too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64

from mmdiff_cache.config import filled
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.statistics import DRAWS, Difference, difference
from mmdiff_cache.experiments.token_edges import Regions, edge_rule, token_regions
from mmdiff_cache.loader import Batch, CachedFeatureDataset, make_loader
from mmdiff_cache.loader.order import partners
from mmdiff_cache.models.mmdiff import MMDiff
from mmdiff_cache.models.unified import OneTask
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.tasks import find_task
from mmdiff_cache.training.build import open_dataset
from mmdiff_cache.training.evaluate import pick_split
from mmdiff_cache.training.run import Run, device_of, model_for_run, one_task, store_of
from mmdiff_cache.training.scoring import autocast

EDGES, INSIDE, ALL = "edges", "inside", "all tokens"
MEAN = "mean over layers"
READ_AT_ONCE = 64
WEIGHING = "token"
"""The kind of aggregator whose weights vary from token to token."""

Means = Float64[np.ndarray, "n T L"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer's weights, or their mean over layers; differences are those of edges minus inside."""

    layer: str
    weights: Mapping[str, tuple[float, ...]]
    """Of each timestep, by EDGES, INSIDE and ALL; the mean over pictures."""
    mean_t: Mapping[str, float]
    """By the same."""
    by_timestep: tuple[Difference, ...]
    """Of each timestep's weight."""
    shift: Difference
    """Of the mean t; the paper's claim makes it negative."""
    shuffled: Difference
    """Of the mean t, at edges and inside of another picture."""
    beyond_shuffled: Difference
    """`shift` minus `shuffled`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionWeights:
    """What the weights of one run do at edges and inside. `str()` is the table."""

    run: str
    task: str
    store: str
    split: str
    edge: str
    """What counts as an edge, in words."""
    timesteps: tuple[float, ...]
    """t of each map on the T axis, in its order."""
    pictures: int
    left_out: int
    """Pictures that have no token at an edge, or none inside."""
    share: Mapping[str, float]
    """Of all tokens of the pictures, those at edges and those inside."""
    layers: tuple[LayerWeights, ...]
    mean: LayerWeights

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class WeighedSplit:
    """A run's model, the pictures of a split that have edges and insides, and where these lie."""

    run: Run
    split: str
    model: MMDiff | OneTask
    dataset: CachedFeatureDataset
    label: LabelSpec
    timesteps: tuple[float, ...]
    regions: Regions
    """Of the pictures of `dataset`, in its order."""
    left_out: int

    @torch.inference_mode()
    def weights(self, batch: Batch) -> Float32[np.ndarray, "B T L N"]:
        """What each timestep counts at each token of each layer, computed as evaluation computes it."""
        device = next(self.model.parameters()).device
        with autocast(device, self.run.config.precision):
            found = self.model.aggregation_weights(batch.hidden_states.to(device))
        return filled(found).float().flatten(3).cpu().numpy()

    def means(self, regions: Mapping[str, Bool[np.ndarray, "n N"]]) -> dict[str, Means]:
        """Each picture's mean weights over its tokens of each region; every picture has some of each."""
        found: dict[str, list[Means]] = {name: [] for name in regions}
        done = 0
        for batch in make_loader(self.dataset, filled(self.run.config.batch_size), shuffle=False):
            weights, here = self.weights(batch).astype(np.float64), slice(done, done + len(batch.ids))
            for name, tokens in regions.items():
                inside = tokens[here, None, None]
                found[name].append(weights.sum(axis=3, where=inside) / inside.sum(axis=3))
            done = here.stop
        return {name: np.concatenate(parts) for name, parts in found.items()}


def open_weighed(
    run: Run | str | Path,
    split: str | None = None,
    *,
    store: str | Path | None = None,
    task: str | None = None,
) -> WeighedSplit:
    """A trained run with averaged weights, and the tokens at edges and inside of a split of its store, by
    default the one that `evaluate` takes.

    `store` says where the store lies now; `task` is one of those of a run of several. Raises ConfigError for
    a run whose weights do not vary from token to token, or fewer than two pictures with edges and insides.
    """
    run = one_task(run, task)
    opened = store_of(run, store)
    split = pick_split(opened, split)
    whole = open_dataset(run.config, opened, split)
    model, timesteps = _weighing(run, whole)
    label = whole.reader.label_specs[find_task(run.config.task, run.config.label).label]
    regions = _regions(whole, label)
    both = np.flatnonzero(regions.edges.any(axis=1) & regions.inside.any(axis=1))
    if len(both) < 2:
        raise ConfigError(
            f"edges and insides are compared over two pictures or more, {whole.reader.path} has {len(both)} "
            f"with both by {edge_rule(label)}; take another split or more samples"
        )
    chosen = tuple(whole.indices[position] for position in both)
    return WeighedSplit(
        run=run,
        split=split,
        model=model.to(device_of(run)),
        dataset=open_dataset(run.config, opened, split, chosen),
        label=label,
        timesteps=timesteps,
        regions=replace(regions, edges=regions.edges[both], inside=regions.inside[both]),
        left_out=len(whole) - len(both),
    )


def _weighing(run: Run, dataset: CachedFeatureDataset) -> tuple[MMDiff | OneTask, tuple[float, ...]]:
    """The model, and t of each map that it weighs; ConfigError where it does not weigh them."""
    kind = run.config.aggregator.kind
    if run.config.aggregator.weighing == "equal":
        raise ConfigError(f"{run.path} gives every timestep the same weight; give a run that learned them")
    if kind != WEIGHING:
        raise ConfigError(
            f"{run.path} fuses by aggregator.kind {kind}, whose weights, if any, are the same at every "
            f"token; give a run with {WEIGHING}"
        )
    timesteps = tuple(t for _, t in dataset.inputs.maps if t is not None)
    model = model_for_run(run)
    if len(set(timesteps)) < 2 or not isinstance(model, MMDiff | OneTask):
        what = f"t = {timesteps[0]:g} alone" if timesteps else f"source {run.config.source!r}"
        raise ConfigError(f"{run.path} reads {what}; give a run of several timesteps")
    return model, timesteps


def _regions(dataset: CachedFeatureDataset, label: LabelSpec) -> Regions:
    """Of all pictures, a few read at a time."""
    parts: list[Regions] = []
    for start in range(0, len(dataset), READ_AT_ONCE):
        values = dataset.reader.labels(label.name, dataset.indices[start : start + READ_AT_ONCE])
        parts.append(token_regions(values, label, dataset.reader.grid))
    return Regions(
        edges=np.concatenate([one.edges for one in parts]),
        inside=np.concatenate([one.inside for one in parts]),
    )


def fusion_weights(weighed: WeighedSplit, *, draws: int = DRAWS, seed: int = 0) -> FusionWeights:
    """Every layer's mean weights at edges and inside, their differences, and those at shuffled edges."""
    own, other = weighed.regions, partners(len(weighed.dataset))
    shuffled_edges, shuffled_inside = f"{EDGES}, shuffled", f"{INSIDE}, shuffled"
    found = weighed.means(
        {
            EDGES: own.edges,
            INSIDE: own.inside,
            ALL: np.ones_like(own.edges),
            shuffled_edges: own.edges[other],
            shuffled_inside: own.inside[other],
        }
    )
    shuffled = {EDGES: found.pop(shuffled_edges), INSIDE: found.pop(shuffled_inside)}
    names = (*weighed.dataset.layers, MEAN)
    timesteps = np.array(weighed.timesteps)
    layers = [
        _layer_weights(
            name, _of_layer(found, number), _of_layer(shuffled, number), timesteps, draws=draws, seed=seed
        )
        for number, name in enumerate(names)
    ]
    return FusionWeights(
        run=str(weighed.run.path),
        task=weighed.run.config.task,
        store=str(weighed.dataset.store.path),
        split=weighed.split,
        edge=edge_rule(weighed.label),
        timesteps=weighed.timesteps,
        pictures=len(weighed.dataset),
        left_out=weighed.left_out,
        share={EDGES: float(own.edges.mean()), INSIDE: float(own.inside.mean())},
        layers=tuple(layers[:-1]),
        mean=layers[-1],
    )


def _of_layer(found: Mapping[str, Means], number: int) -> dict[str, Float64[np.ndarray, "n T"]]:
    """The weights of one layer; behind the last stands their mean."""
    return {
        name: means[:, :, number] if number < means.shape[2] else means.mean(axis=2)
        for name, means in found.items()
    }


def _layer_weights(
    name: str,
    own: Mapping[str, Float64[np.ndarray, "n T"]],
    shuffled: Mapping[str, Float64[np.ndarray, "n T"]],
    timesteps: Float64[np.ndarray, " T"],
    *,
    draws: int,
    seed: int,
) -> LayerWeights:
    apart, apart_shuffled = own[EDGES] - own[INSIDE], shuffled[EDGES] - shuffled[INSIDE]
    nothing = np.zeros(len(apart))

    def gap(one: Float64[np.ndarray, " n"], other: Float64[np.ndarray, " n"]) -> Difference:
        return paired(one, other, draws=draws, seed=seed)

    return LayerWeights(
        layer=name,
        weights={region: tuple(means.mean(axis=0).tolist()) for region, means in own.items()},
        mean_t={region: float((means @ timesteps).mean()) for region, means in own.items()},
        by_timestep=tuple(gap(column, nothing) for column in apart.T),
        shift=gap(apart @ timesteps, nothing),
        shuffled=gap(apart_shuffled @ timesteps, nothing),
        beyond_shuffled=gap(apart @ timesteps, apart_shuffled @ timesteps),
    )


def paired(
    one: Float64[np.ndarray, " n"], other: Float64[np.ndarray, " n"], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """The mean over pictures of one number minus that of another."""
    count = np.ones(len(one))
    return difference(
        np.stack([one, count], axis=1), np.stack([other, count], axis=1), _mean, draws=draws, seed=seed
    )


def _mean(sums: Float64[np.ndarray, "D 2"]) -> Float64[np.ndarray, " D"]:
    return sums[:, 0] / sums[:, 1]


def _lines(found: FusionWeights) -> list[str]:
    """A Markdown table, a line a layer."""
    times = [f"{t:g}" for t in found.timesteps]
    heads = ["layer", f"mean t {EDGES} / {INSIDE}", f"{EDGES} - {INSIDE}", "shuffled", "beyond shuffled"]
    heads += [f"w({t}) {EDGES} / {INSIDE}, difference" for t in times]
    rows = [
        [
            one.layer,
            f"{one.mean_t[EDGES]:.4f} / {one.mean_t[INSIDE]:.4f}",
            *map(str, (one.shift, one.shuffled, one.beyond_shuffled)),
            *(
                f"{edge:.4f} / {inside:.4f}, {gap}"
                for edge, inside, gap in zip(
                    one.weights[EDGES], one.weights[INSIDE], one.by_timestep, strict=True
                )
            ),
        ]
        for one in (*found.layers, found.mean)
    ]
    title = (
        f"{found.task}, {found.run}, {found.pictures} pictures of {found.split} of {found.store} "
        f"({found.left_out} left out without edges or insides); edge: {found.edge}; "
        f"{found.share[EDGES]:.1%} of the tokens at edges, {found.share[INSIDE]:.1%} inside"
    )
    return [title, "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))]
