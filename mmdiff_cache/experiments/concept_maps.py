"""Do concept maps show what their words name? Each map against the mask of its word, without any training.

A map has one value a token, so it is scored as it is: each token counts with the numbers of its pixels inside
and outside of the mask. AP (average precision, the area under precision over recall) is of each picture, then
the mean over pictures; IoU is that of the one best threshold for all pictures. Pictures in which all or no
known pixels lie in the mask are left out.

Beside the maps stand those of other pictures (shuffled), those of other words, the distance from the middle
of the picture (a blob, or for words such as background its inverse), and the mask itself on the token grid,
which bounds them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy.typing import NDArray

from mmdiff_cache.config import ConceptMapsConfig, filled
from mmdiff_cache.errors import ConfigError, DataError
from mmdiff_cache.experiments.concept_masks import AROUND, NamedMask, masks_of, named_mask
from mmdiff_cache.experiments.statistics import DRAWS, Difference, difference
from mmdiff_cache.loader.dataset import usable_samples
from mmdiff_cache.loader.inputs import Guide, make_guide, plain_variant
from mmdiff_cache.loader.order import partners
from mmdiff_cache.store.reader import SplitReader, Store, open_store

MAPS, BOUND = "maps", "mask on the grid"
SHUFFLED, CENTRE, OTHER = "shuffled", "centre blob", "other words"
CONTROLS = (SHUFFLED, CENTRE, OTHER)
"""What maps have to beat; the last where other words are given."""
AP, IOU = "ap", "iou"
THRESHOLDS = 256
"""Quantiles of all tokens' values, among which the best threshold is looked for."""
COUNTS = 1
"""Column of a picture's statistics: whether it counts."""
READ_AT_ONCE = 64
MEAN = "mean"

Tokens = Shaped[np.ndarray, "n N"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WordScore:
    """One word's map, and what stands beside it; or the mean over words."""

    word: str
    mask: str
    pictures: int
    scores: Mapping[str, Mapping[str, float]]
    """AP and IoU, by MAPS, BOUND and CONTROLS."""
    gains: Mapping[str, Difference]
    """By how much the AP of the maps is higher than that of each control, by paired bootstrap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptMapScores:
    """The words of a vocabulary that name a mask, and their mean. `str()` is the table."""

    store: str
    split: str
    vocabulary: str
    others: str | None
    """The vocabulary of the other words."""
    timesteps: tuple[float, ...]
    words: tuple[WordScore, ...]
    mean: WordScore
    without_mask: tuple[str, ...]
    not_shown: tuple[str, ...]
    """Words with a mask that tells nothing: in no picture are there pixels inside and outside of it."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def concept_map_scores(
    store: Store | str | Path,
    vocabulary: str,
    split: str = "test",
    *,
    timesteps: Sequence[float] | None = None,
    others: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> ConceptMapScores:
    """Score every map of a vocabulary whose word names something that the store's labels show.

    Maps are read as training reads them, over all stored timesteps or those given. `others` is a vocabulary
    of as many words, each in the place of the one of its number: words that mean something else, or nothing.
    Raises ConfigError for what the store does not hold, or where no word names a mask; DataError where no
    picture shows any of them.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    reader = opened[split]
    chosen = tuple(timesteps or reader.timesteps)
    guides = [
        make_guide(opened.manifest.schema, name, ConceptMapsConfig(), chosen, reader.path)
        for name in (vocabulary, others)
        if name is not None
    ]
    words = guides[0].channels
    named = {n: mask for n, word in enumerate(words) if (mask := named_mask(word, reader.label_specs))}
    _check(guides, named, reader)
    samples = usable_samples(reader, range(len(reader)), list({mask.label for mask in named.values()}))
    maps = {
        source: _in_parts(partial(_read, guide, reader), samples)
        for source, guide in zip((MAPS, OTHER), guides, strict=False)
    }
    found = {
        mask: _statistics(
            mask, {source: values[:, number] for source, values in maps.items()}, reader, samples
        )
        for number, mask in named.items()
    }
    shown = {mask: one for mask, one in found.items() if one[MAPS][:, COUNTS].any()}
    if not shown:
        raise DataError(
            f"none of the {len(samples)} pictures of {split} in {reader.path} shows the mask of a word of "
            f"{vocabulary!r}; score more pictures"
        )
    return ConceptMapScores(
        store=str(opened.path),
        split=split,
        vocabulary=vocabulary,
        others=others,
        timesteps=chosen,
        words=tuple(_word_score(mask.word, str(mask), [one], draws, seed) for mask, one in shown.items()),
        mean=_word_score(MEAN, f"{len(shown)} words", list(shown.values()), draws, seed),
        without_mask=tuple(word for number, word in enumerate(words) if number not in named),
        not_shown=tuple(mask.word for mask in found if mask not in shown),
    )


def _check(guides: Sequence[Guide], named: Mapping[int, NamedMask], reader: SplitReader) -> None:
    words, *others = (guide.channels for guide in guides)
    if others and len(others[0]) != len(words):
        raise ConfigError(
            f"other words are needed for each of {', '.join(words)}, got {', '.join(others[0])}; "
            "give a vocabulary of as many"
        )
    if not named:
        raise ConfigError(
            f"no word of {guides[0].name!r} ({', '.join(words)}) names a mask in the labels of "
            f"{reader.path}: {', '.join(reader.label_specs) or 'none'}"
        )


def _read(guide: Guide, reader: SplitReader, samples: Sequence[int]) -> Float32[np.ndarray, "B K h w"]:
    timesteps = filled(guide.how.timesteps)
    return guide.maps(reader.concept_scores(guide.name, samples, timesteps, plain_variant(reader)))


def _in_parts(read: Callable[[Sequence[int]], NDArray[Any]], samples: Sequence[int]) -> NDArray[Any]:
    """What `read` gives of all samples, a few at a time."""
    starts = range(0, len(samples), READ_AT_ONCE)
    return np.concatenate([read(samples[start : start + READ_AT_ONCE]) for start in starts])


def _statistics(
    mask: NamedMask,
    maps: Mapping[str, Shaped[np.ndarray, "n h w"]],
    reader: SplitReader,
    samples: Sequence[int],
) -> dict[str, Float64[np.ndarray, "n K"]]:
    """What every picture adds, for the maps and for all that stands beside them."""
    count, *grid = maps[MAPS].shape

    def counted(some: Sequence[int]) -> NDArray[np.int64]:
        pair = masks_of(mask, reader.labels(mask.label, some), reader.label_specs[mask.label])
        return np.stack([_pixels_a_token(part, (grid[0], grid[1])) for part in pair], axis=1)

    inside, outside = np.moveaxis(_in_parts(counted, samples), 1, 0)
    flat = {source: values.reshape(count, -1) for source, values in maps.items()}
    blob = _blob(grid[0], grid[1]) * (-1 if mask.word in AROUND else 1)
    beside = {
        **flat,
        SHUFFLED: flat[MAPS][partners(count)],
        CENTRE: np.broadcast_to(blob, inside.shape),
        BOUND: inside / np.maximum(inside + outside, 1),
    }
    return {source: map_statistics(values, inside, outside) for source, values in beside.items()}


def _pixels_a_token(mask: Shaped[np.ndarray, "B H W"], grid: tuple[int, int]) -> NDArray[np.int64]:
    rows, columns = grid
    count, height, width = mask.shape
    cells = mask.reshape(count, rows, height // rows, columns, width // columns)
    return cells.sum(axis=(2, 4), dtype=np.int64).reshape(count, rows * columns)


def _blob(rows: int, columns: int) -> Float64[np.ndarray, " N"]:
    """The higher the nearer to the middle; any blob that falls off towards the borders ranks alike."""
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    return -(y**2 + x**2).ravel()


def map_statistics(values: Tokens, inside: Tokens, outside: Tokens) -> Float64[np.ndarray, "n K"]:
    """AP, 1 if the picture counts, and pixels inside and outside by the tokens' rank among THRESHOLDS.

    `values` are the maps of n pictures, the others numbers of pixels of each token.
    """
    edges = np.quantile(values, np.linspace(0, 1, THRESHOLDS, endpoint=False))
    rank = np.searchsorted(edges, values, side="right") - 1
    rows: list[NDArray[np.float64]] = []
    for value, place, yes, no in zip(values, rank, inside, outside, strict=True):
        row = np.zeros(2 + 2 * THRESHOLDS)
        if yes.any() and no.any():
            pixels = [np.bincount(place, weights=part, minlength=THRESHOLDS) for part in (yes, no)]
            row = np.concatenate([[average_precision(value, yes, no), 1], *pixels])
        rows.append(row)
    return np.stack(rows)


def map_scores(sums: Float64[np.ndarray, "D K"]) -> dict[str, Float64[np.ndarray, " D"]]:
    """AP and IoU of sums of `map_statistics`; NaN where no picture counts."""
    inside, outside = np.split(sums[:, 2:], 2, axis=1)
    hits, wrong = (np.cumsum(part[:, ::-1], axis=1) for part in (inside, outside))
    whole = inside.sum(axis=1, keepdims=True)
    some = np.where(sums[:, 1] > 0, sums[:, 1], np.nan)
    iou = (hits / np.where(whole > 0, whole + wrong, np.nan)).max(axis=1)
    return {AP: sums[:, 0] / some, IOU: iou}


def average_precision(
    values: Shaped[np.ndarray, " N"], inside: Shaped[np.ndarray, " N"], outside: Shaped[np.ndarray, " N"]
) -> float:
    """The sum over thresholds of precision times the recall gained; equal values are one threshold.

    `inside` and `outside` say how many pixels have each value.
    """
    order = np.argsort(-values, kind="stable")
    hits, seen = np.cumsum(inside[order]), np.cumsum((inside + outside)[order])
    last = np.append(np.diff(values[order]) != 0, True) & (seen > 0)
    precision = hits[last] / seen[last]
    return float(np.sum(precision * np.diff(hits[last], prepend=0)) / hits[-1])


def _word_score(
    word: str,
    mask: str,
    found: Sequence[Mapping[str, Float64[np.ndarray, "n K"]]],
    draws: int,
    seed: int,
) -> WordScore:
    """The scores of one word, or the means of several."""
    scores = {name: [map_scores(one[name].sum(axis=0)[None]) for one in found] for name in found[0]}
    # of each word AP and whether the picture counts: all that the bootstrap has to weigh
    precise = {name: np.concatenate([one[name][:, :2] for one in found], axis=1) for name in found[0]}
    return WordScore(
        word=word,
        mask=mask,
        pictures=int(precise[MAPS][:, 1::2].any(axis=1).sum()),
        scores={
            name: {score: float(np.mean([one[score] for one in each])) for score in (AP, IOU)}
            for name, each in scores.items()
        },
        gains={
            control: difference(precise[MAPS], precise[control], _mean_precision, draws=draws, seed=seed)
            for control in CONTROLS
            if control in precise
        },
    )


def _mean_precision(sums: Float64[np.ndarray, "D K"]) -> Float64[np.ndarray, " D"]:
    """AP of every word, then the mean over words; NaN where a word is in none of the pictures."""
    counted = sums[:, 1::2]
    return (sums[:, 0::2] / np.where(counted > 0, counted, np.nan)).mean(axis=1)


def _lines(found: ConceptMapScores) -> list[str]:
    """A Markdown table, a line a word."""
    controls = tuple(found.mean.gains)
    sources = (MAPS, *controls, BOUND)
    heads = ["word", "mask", "pictures", *(f"{one} AP / IoU" for one in sources)]
    heads += [f"gain over {control} (AP)" for control in controls]
    rows = [
        [
            one.word,
            one.mask,
            str(one.pictures),
            *(f"{one.scores[name][AP]:.3f} / {one.scores[name][IOU]:.3f}" for name in sources),
            *(str(one.gains[control]) for control in controls),
        ]
        for one in (*found.words, found.mean)
    ]
    lines = [heads, ["---"] * len(heads), *rows]
    times = ", ".join(f"{t:g}" for t in found.timesteps)
    title = f"{found.vocabulary} on {found.split} of {found.store}, t = {times}"
    if found.others is not None:
        title += f"; other words: {found.others}"
    if found.without_mask:
        title += f"; without a mask: {', '.join(found.without_mask)}"
    if found.not_shown:
        title += f"; in no picture: {', '.join(found.not_shown)}"
    return [title, "", *(f"| {' | '.join(row)} |" for row in lines)]
