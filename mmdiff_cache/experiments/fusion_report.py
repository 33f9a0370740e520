"""Fusion weights for a reader: claims over the runs of several seeds, a figure, some pictures with maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.fusion_weights import (
    EDGES,
    INSIDE,
    FusionWeights,
    LayerWeights,
    WeighedSplit,
)
from mmdiff_cache.experiments.judgement import SEEDS
from mmdiff_cache.experiments.report import as_markdown
from mmdiff_cache.experiments.statistics import Difference, reversed_sign, verdict
from mmdiff_cache.visuals.colours import RGB, label_to_colour, ramp
from mmdiff_cache.visuals.panels import Sheet, Tile

CLAIM = "mean t is smaller at edges than inside (Sec. 3.1)"
CONTROL = "it is smaller by more than at the edges of other pictures"
COLOURS = {EDGES: "tab:red", INSIDE: "tab:blue"}
PANEL_INCHES = (2.9, 5.2)
TAILS = (2, 98)
"""Percentiles between which a map's colours run, over all pictures that are shown."""


def check_alike(found: Sequence[FusionWeights]) -> None:
    """Raise ConfigError for runs that differ in more than their seeds, or one that is given twice."""
    first = found[0]
    for one in found[1:]:
        for name in ("task", "split", "edge", "timesteps", "pictures"):
            mine, theirs = getattr(first, name), getattr(one, name)
            if mine != theirs:
                raise ConfigError(
                    f"runs of one table differ in their seeds alone; {name} is {mine!r} of {first.run} and "
                    f"{theirs!r} of {one.run}"
                )
        if [layer.layer for layer in one.layers] != [layer.layer for layer in first.layers]:
            raise ConfigError(f"runs of one table read the same layers; {one.run} reads others")
    if len({one.run for one in found}) < len(found):
        raise ConfigError("each run counts as a seed of its own; one of them is given twice")


def claims(found: Sequence[FusionWeights]) -> dict[str, list[Difference]]:
    """What every run says of the claims, on the mean over layers; positive where a claim holds."""
    return {
        CLAIM: [reversed_sign(one.mean.shift) for one in found],
        CONTROL: [reversed_sign(one.mean.beyond_shuffled) for one in found],
    }


def verdict_words(differences: Sequence[Difference]) -> str:
    """The verdict; too few runs leave it open."""
    if len(differences) < SEEDS:
        return f"open (a verdict takes {SEEDS} seeds, there are {len(differences)})"
    return verdict(differences)


def markdown(found: Sequence[FusionWeights]) -> str:
    """Claims, the means over runs, then the table of each run."""
    gains = claims(found)
    rows = [[claim, "\n".join(map(str, each)), f"**{verdict_words(each)}**"] for claim, each in gains.items()]
    title = "gain in mean t, a line a run (+ is as claimed) [95 % interval]"
    parts = [
        f"# Fusion weights at edges and inside, {found[0].task}",
        as_markdown(["claim", title, "verdict"], rows),
        f"## Mean over {_runs(found)}\n\n{_means(found)}",
        *(f"## Run {number}\n\n{one}" for number, one in enumerate(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _runs(found: Sequence[FusionWeights]) -> str:
    return "1 run" if len(found) == 1 else f"{len(found)} runs"


def _means(found: Sequence[FusionWeights]) -> str:
    """Each layer's weights by region, averaged over runs."""
    titles = ["layer", "tokens", "mean t", *(f"w({t:g})" for t in found[0].timesteps)]
    lines: list[list[str]] = []
    for layers in _by_layer(found):
        for region in layers[0].weights:
            mean_t = float(np.mean([one.mean_t[region] for one in layers]))
            weights = _weights(layers, region).mean(axis=0)
            lines.append([layers[0].layer, region, f"{mean_t:.4f}", *(f"{w:.4f}" for w in weights)])
    return as_markdown(titles, lines)


def _by_layer(found: Sequence[FusionWeights]) -> list[tuple[LayerWeights, ...]]:
    """Of each layer, and of their mean, what every run has."""
    return list(zip(*((*one.layers, one.mean) for one in found), strict=True))


def _weights(layers: Sequence[LayerWeights], region: str) -> Float64[np.ndarray, "R T"]:
    return np.array([one.weights[region] for one in layers])


def draw(found: Sequence[FusionWeights], path: Path) -> None:
    """Write a PNG: weights against t above, edges minus inside below, a panel a layer and one of the mean."""
    panels = _by_layer(found)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window, whatever backend is chosen elsewhere
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    places = np.arange(len(found[0].timesteps))
    for column, layers in enumerate(panels):
        _draw_weights(axes[0, column], layers, places)
        _draw_gaps(axes[1, column], layers, places)
        axes[1, column].set_xticks(places, [f"{t:g}" for t in found[0].timesteps])
        axes[1, column].set_xlabel("t (1 = noise)")
    axes[0, 0].set_ylim(bottom=0)  # after all is drawn: the panels of a row share it
    axes[0, 0].set_ylabel("mean weight")
    axes[1, 0].set_ylabel(f"{EDGES} minus {INSIDE}")
    axes[0, 0].legend(frameon=False)
    pictures = f"{found[0].pictures} pictures of {found[0].split}, {_runs(found)}"
    figure.suptitle(
        f"{found[0].task}, {pictures}; edge: {found[0].edge}\n"
        "above: lines are means over runs, points runs; below: each run with its 95 % interval",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _draw_weights(axes: Axes, layers: Sequence[LayerWeights], places: np.ndarray) -> None:
    """The mean over runs as a line, each run as a point."""
    for region, colour in COLOURS.items():
        weights = _weights(layers, region)
        axes.plot(places, weights.mean(axis=0), color=colour, label=region)
        for one in weights:
            axes.plot(places, one, "o", color=colour, markersize=3.5, alpha=0.6)
    means = [np.mean([one.mean_t[region] for one in layers]) for region in COLOURS]
    axes.set_title(f"{layers[0].layer}\nmean t {means[0]:.3f} {EDGES}, {means[1]:.3f} {INSIDE}", fontsize=9)
    axes.grid(alpha=0.3)


def _draw_gaps(axes: Axes, layers: Sequence[LayerWeights], places: np.ndarray) -> None:
    """Each run beside the others at every t."""
    shifts = (np.arange(len(layers)) - (len(layers) - 1) / 2) * 0.15
    axes.axhline(0, color="grey", linewidth=0.8)
    for one, shift in zip(layers, shifts, strict=True):
        gaps = one.by_timestep
        middle = np.array([gap.estimate for gap in gaps])
        ends = np.array([[gap.estimate - gap.low, gap.high - gap.estimate] for gap in gaps]).T
        axes.errorbar(places + shift, middle, yerr=ends, fmt="o", color="black", markersize=3.5, capsize=2)
    axes.grid(alpha=0.3)


def example_sheet(weighed: WeighedSplit, count: int) -> Sheet:
    """Some pictures, their labels, where their edges are, and the mean t of every token.

    The pictures are evenly spaced over the split; each map has one scale for all of them.
    """
    count = min(count, len(weighed.dataset))
    positions = [number * len(weighed.dataset) // count for number in range(count)]
    batch = weighed.dataset.batch(positions)
    layers = np.einsum("btln,t->lbn", weighed.weights(batch), np.array(weighed.timesteps))
    maps = {"mean over layers": layers.mean(axis=0), **dict(zip(weighed.dataset.layers, layers, strict=True))}
    spans = {name: (float(low), float(high)) for name, (low, high) in _spans(maps).items()}
    images = weighed.dataset.reader.images(batch.indices.tolist())
    truths = batch.targets[weighed.label.name].numpy()
    rows = [
        [
            Tile(picture=images[row], caption=batch.ids[row]),
            Tile(picture=label_to_colour(weighed.label, truths[row], images[row])),
            Tile(picture=_edge_map(weighed, position, images[row])),
            *(_map_tile(weighed, values[row], spans[name], images[row]) for name, values in maps.items()),
        ]
        for row, position in enumerate(positions)
    ]
    return Sheet(
        title=f"Mean t of every token, {weighed.run.config.task} by {'/'.join(weighed.run.path.parts[-2:])}",
        note="Maps: bright = clean (small t), dark = noisy, one scale a column, below it. "
        "Edges: bright; inside: dark; neither: between.",
        rows=rows,
        columns=["picture", "label", "edges", *maps],
    )


def _spans(maps: Mapping[str, Float[np.ndarray, "B N"]]) -> dict[str, Float64[np.ndarray, " 2"]]:
    return {name: np.percentile(values, TAILS) for name, values in maps.items()}


def _edge_map(weighed: WeighedSplit, position: int, image: UInt8[RGB, "H W 3"]) -> RGB:
    edges, inside = weighed.regions.edges[position], weighed.regions.inside[position]
    return _as_large(weighed, np.where(edges, 1.0, np.where(inside, 0.0, 0.5)), image)


def _map_tile(
    weighed: WeighedSplit,
    mean_t: Float[np.ndarray, " N"],
    span: tuple[float, float],
    image: UInt8[RGB, "H W 3"],
) -> Tile:
    low, high = span
    brightness = (high - mean_t) / max(high - low, 1e-12)
    return Tile(
        picture=_as_large(weighed, brightness.astype(np.float64), image),
        caption=f"t {low:.2f} to {high:.2f}",
    )


def _as_large(weighed: WeighedSplit, values: Float64[np.ndarray, " N"], image: UInt8[RGB, "H W 3"]) -> RGB:
    """Values of tokens in colour, as large as the picture."""
    rows, columns = weighed.dataset.reader.grid
    tokens = ramp(values.reshape(rows, columns))
    return tokens.repeat(image.shape[0] // rows, axis=0).repeat(image.shape[1] // columns, axis=1)
