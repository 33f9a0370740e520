"""Captions out of a small closed vocabulary. What a caption claims is true of its scene.

The order of the objects, the wording and the clauses come from the caption's own random stream: they know
nothing of position, depth or salience, except that a claim such as 'near' is made only where it holds.
"""

from dataclasses import dataclass

import numpy as np

from mmdiff_cache.scenes.world import COLOURS, GROUNDS, SHAPES, TEXTURES, choose

CONCEPT_WORDS = (
    "object", "background", "foreground", "near", "far", "surface",
    "depth", "detail", "edges", "salient", "contour", "in front of",
)  # fmt: skip
NEAR, FAR_AWAY = 3.6, 4.4  # metres: an object is called near below the one, far away above the other
_WHEN = {
    "day": ("by day", "in daylight", "during the day"),
    "dusk": ("at dusk", "in the evening", "at sunset"),
    "night": ("at night", "in the dark", "by moonlight"),
}
_NUMBERS = ("no", "one", "two", "three", "four")
_ROUND = ("ball", "cylinder", "capsule", "cone")
_FRAMES = (
    "{things} {where} {when}",
    "{things} {where} {when}",
    "{where} {when}, {things}",
    "{when} {where}, {things}",
    "a scene with {things} {where} {when}",
    "a picture of {things} {where} {when}",
    "{things} resting {where} {when}",
    "{things}, {ground} ground, {when}",
    "we see {things} {where} {when}",
    "a view of {things} {where} {when}",
)
_OTHER_WORDS = """
a an and at away background by camera clear contour dark day daylight depth detail during dusk edges
evening far fine foreground four front ground grows has horizon in is moonlight near night object
objects of off on one out picture resting round salient scene see sharp sky stands sunset surface
the three to two view we with
"""
VOCABULARY = tuple(sorted({*COLOURS, *GROUNDS, *SHAPES, *TEXTURES, *_OTHER_WORDS.split()}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What a caption may say of one object. Depth in metres; overlaps lists objects it partly hides."""

    shape: str
    colour: str
    texture: str
    depth: float
    hides: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """The text, and the objects' numbers in the order in which it names them."""

    text: str
    order: tuple[int, ...]


def scene_prompt(ground: str, time_of_day: str) -> str:
    """Ground and time alone: 'on sand at dusk'."""
    return f"on {ground} {_WHEN[time_of_day][0]}"


def write_caption(
    rng: np.random.Generator, objects: tuple[Named, ...], ground: str, time_of_day: str
) -> Caption:
    """One or two sentences, at most 40 words, that name every object, the ground and the time."""
    order = tuple(int(number) for number in np.argsort(rng.random(len(objects)), kind="stable"))
    things = _join([_thing(rng, objects[number]) for number in order])
    when = choose(rng, _WHEN[time_of_day])
    where = choose(rng, ("on {}", "on {}", "on the {}")).format(ground)
    text = choose(rng, _FRAMES).format(things=things, where=where, when=when, ground=ground)
    if float(rng.random()) < 0.92:
        clause = _clause(rng, objects, order, ground)
        text = f"{text}{choose(rng, (', ', '. '))}{clause}"
    return Caption(text=text + ".", order=order)


def _thing(rng: np.random.Generator, named: Named) -> str:
    """'a red striped ball'; the texture is dropped in a third of the cases, and mostly where it is plain."""
    keep = float(rng.random()) < (0.25 if named.texture == "plain" else 0.7)
    words = [named.colour, *([named.texture] if keep else []), named.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _join(things: list[str]) -> str:
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"


def _clause(rng: np.random.Generator, objects: tuple[Named, ...], order: tuple[int, ...], ground: str) -> str:
    """One true remark that holds a concept word or two."""
    one = objects[choose(rng, order)]
    name = f"the {one.colour} {one.shape}"
    kind = int(float(rng.random()) * 11)
    match kind:
        case 0:
            return _in_front(rng, objects)
        case 1:
            third = f"{name} in front of the background"
            return choose(rng, ("the background is sky", "sky in the background", third))
        case 2:
            return choose(rng, (f"the foreground is {ground}", f"{ground} in the foreground"))
        case 3:
            return _distance(rng, objects, near=True) or f"{ground} near and far"
        case 4:
            return _distance(rng, objects, near=False) or "the sky is far away"
        case 5:
            return choose(rng, (f"the surface is {ground}", f"{name} has a {one.texture} surface"))
        case 6:
            return choose(rng, ("the depth grows to the horizon", "a view with depth"))
        case 7:
            return choose(rng, (f"{name} with clear detail", "fine detail on the ground"))
        case 8:
            return f"{name} has {'round' if one.shape in _ROUND else 'sharp'} edges"
        case 9:
            return choose(rng, ("one salient object", "one object is salient", "a salient object stands out"))
        case _:
            return choose(rng, (f"{name} has a clear contour", f"the contour of {name}"))


def _in_front(rng: np.random.Generator, objects: tuple[Named, ...]) -> str:
    pairs = tuple((front, back) for front, named in enumerate(objects) for back in named.hides)
    if not pairs:
        return f"{_counted(len(objects))} in front of the {choose(rng, ('sky', 'background'))}"
    front, back = (objects[number] for number in choose(rng, pairs))
    return f"the {front.colour} {front.shape} is in front of the {back.colour} {back.shape}"


def _counted(count: int) -> str:
    return "one object" if count == 1 else f"{_NUMBERS[count]} objects"


def _distance(rng: np.random.Generator, objects: tuple[Named, ...], *, near: bool) -> str:
    fitting = tuple(named for named in objects if (named.depth < NEAR if near else named.depth > FAR_AWAY))
    if not fitting:
        return ""
    one = choose(rng, fitting)
    name = f"the {one.colour} {one.shape}"
    return name + choose(rng, (" is near", " near the camera") if near else (" is far away", " far off"))
