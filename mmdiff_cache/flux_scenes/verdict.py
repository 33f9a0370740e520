"""From the judge's reading of a picture to what is in it, and from that to prompt adherence.

Rules: an object is a connected patch of one colour of at least MIN_AREA pixels (at half resolution); its
shape is the most probable one over the patch, and a further shape that owns a SECOND share of it
is a further object.
Only prompts whose objects are all plain to see are scored (`is_plain`): what is hidden, nobody can judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdiff_cache.flux_scenes.judge import Reading
from mmdiff_cache.scenes import CLASS_NAMES, COLOURS, GROUNDS, HELD_OUT_PAIRS, SHAPES, TIMES, Scene

MIN_AREA = 24  # pixels of a 64 x 64 map: 0.6 % of the picture
SECOND = 0.45  # of a patch
PLAIN_AREA = 0.015  # of the picture that every object of a scored prompt shows at least
PLAIN_HIDDEN = 0.1  # of an object's silhouette that may be hidden or cut off

_FIRST_OBJECT = CLASS_NAMES.index(SHAPES[0])
ATTRIBUTES = ("pairs", "count", "ground", "time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a prompt claims or a picture shows. `pairs` are (colour, shape), one an object."""

    pairs: tuple[tuple[str, str], ...]
    ground: str
    time: str


def claimed(scene: Scene) -> Content:
    """What the scene's caption says: it names every object, the ground and the time."""
    pairs = tuple((one.colour, one.shape) for one in scene.objects)
    return Content(pairs=pairs, ground=scene.ground, time=scene.time_of_day)


def is_plain(scene: Scene) -> bool:
    """Whether every object is large enough, visible enough, and the only one of its colour."""
    least = PLAIN_AREA * scene.size**2
    seen = all(one.visible_pixels >= least and one.hidden_share <= PLAIN_HIDDEN for one in scene.objects)
    return seen and len({one.colour for one in scene.objects}) == len(scene.objects)


def has_held_out_pair(content: Content) -> bool:
    """Whether it holds a combination that pretraining never showed."""
    return any(pair in HELD_OUT_PAIRS for pair in content.pairs)


def contents(reading: Reading) -> list[Content]:
    """What each picture of a batch shows."""
    rows = zip(reading.classes, reading.colours, reading.grounds, reading.times, strict=True)
    return [
        Content(
            pairs=tuple(find_objects(classes, colours)),
            ground=GROUNDS[int(ground.argmax())],
            time=TIMES[int(moment.argmax())],
        )
        for classes, colours, ground, moment in rows
    ]


def find_objects(classes: Tensor, colours: Tensor) -> list[tuple[str, str]]:
    """(colour, shape) of each object, from log-probabilities [class h w] and [colour h w]."""
    kinds = classes.argmax(0)
    tints = torch.where(kinds >= _FIRST_OBJECT, colours.argmax(0), -1)
    found: list[tuple[str, str]] = []
    for number, colour in enumerate(COLOURS):
        for patch in patches(tints == number):
            area = int(patch.sum())
            if area < MIN_AREA:
                continue
            best = int(classes[_FIRST_OBJECT:, patch].sum(1).argmax())
            shares = torch.bincount(kinds[patch] - _FIRST_OBJECT, minlength=len(SHAPES)) / area
            others = [
                n
                for n in range(len(SHAPES))
                if n != best and shares[n] >= SECOND and shares[n] * area >= MIN_AREA
            ]
            found += [(colour, SHAPES[n]) for n in (best, *others)]
    return found


def patches(mask: Tensor) -> list[Tensor]:
    """Connected parts (four neighbours) of a boolean map [h w], each as a boolean map."""
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(1, 1, *mask.shape) * mask
    while True:
        across = F.max_pool2d(numbers, (1, 3), 1, (0, 1))
        spread = torch.maximum(across, F.max_pool2d(numbers, (3, 1), 1, (1, 0))) * mask
        if torch.equal(spread, numbers):
            break
        numbers = spread
    return [numbers[0, 0] == value for value in numbers[mask[None, None]].unique()]


def score(claims: Sequence[Content], shown: Sequence[Content]) -> dict[str, float]:
    """Adherence by attribute, each in 0..1.

    pairs: share of all claimed (colour, shape) pairs that are shown; count: share of pictures that show
    as many objects as claimed; ground, time: share of pictures with the claimed one; precision: share of
    the shown objects that were claimed; colours: share of the claimed colours that are shown; mean: of the
    first four.
    """
    hits = sum(
        pair in picture.pairs for claim, picture in zip(claims, shown, strict=True) for pair in claim.pairs
    )
    right = sum(
        pair in claim.pairs for claim, picture in zip(claims, shown, strict=True) for pair in picture.pairs
    )
    both = list(zip(claims, shown, strict=True))
    found = {
        "pairs": hits / max(1, sum(len(claim.pairs) for claim in claims)),
        "count": sum(len(claim.pairs) == len(picture.pairs) for claim, picture in both) / len(both),
        "ground": sum(claim.ground == picture.ground for claim, picture in both) / len(both),
        "time": sum(claim.time == picture.time for claim, picture in both) / len(both),
    }
    found["mean"] = sum(found[name] for name in ATTRIBUTES) / len(ATTRIBUTES)
    wanted = [(colour, picture) for claim, picture in both for colour in sorted({c for c, _ in claim.pairs})]
    found["colours"] = sum(any(c == colour for c, _ in picture.pairs) for colour, picture in wanted) / max(
        1, len(wanted)
    )
    found["precision"] = right / max(1, sum(len(picture.pairs) for picture in shown))
    return found


def headline(
    generated: dict[str, float], shuffled: dict[str, float], real: dict[str, float]
) -> dict[str, float]:
    """(generated - shuffled) / (real - shuffled) of each score: 0 is chance, 1 is as good as a render.

    A score that the shuffled prompts reach as well says nothing and is left out.
    """
    return {
        name: (generated[name] - shuffled[name]) / (real[name] - shuffled[name])
        for name in (*ATTRIBUTES, "mean", "colours")
        if real[name] != shuffled[name]
    }


def shift(claims: Sequence[Content], places: int = 1) -> list[Content]:
    """Every claim moved on by so many pictures: the shuffled prompts."""
    return [*claims[places:], *claims[:places]]


def chance(claims: Sequence[Content]) -> dict[str, float]:
    """What a faultless picture of another claim scores, over all shuffles: where a judge should be then."""
    found = [score(shift(claims, places), claims) for places in range(1, len(claims))]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}
