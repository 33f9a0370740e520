"""The readings of one sample: several noise draws, each with a twin that is mirrored left to right."""

import re
from dataclasses import replace

from mmdiff_cache.records import PreparedSample
from mmdiff_cache.store.schema import Variant

PLAIN = Variant()
"""The first draw of the picture as it is."""
PAIRS = {"left": "right", "leftmost": "rightmost", "leftward": "rightward", "leftwards": "rightwards"}
SWAPPED = PAIRS | {right: left for left, right in PAIRS.items()}
SIDES = re.compile(rf"\b({'|'.join(SWAPPED)})\b", re.IGNORECASE)


def variants_of(draws: int, *, flip: bool) -> tuple[Variant, ...]:
    """Every draw of the picture as it is, then every draw of its mirror image."""
    return tuple(
        Variant(noise_draw=draw, flipped=flipped)
        for flipped in ((False, True) if flip else (False,))
        for draw in range(draws)
    )


def as_variant(sample: PreparedSample, variant: Variant) -> PreparedSample:
    """What the backbone is given for a variant; labels stay as they are, for the store keeps one of each."""
    if not variant.flipped:
        return sample
    return replace(sample, image=sample.image[:, ::-1], prompt=mirrored(sample.prompt))


def mirrored(prompt: str) -> str:
    """A prompt with the words for left and right exchanged, in their own spelling.

    It looks at words, not at what they mean: 'right' in the sense of 'correct' is exchanged as well.
    """
    return SIDES.sub(_other_side, prompt)


def _other_side(match: re.Match[str]) -> str:
    word, other = match[0], SWAPPED[match[0].lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
