"""The judge: a small network that reads a picture of the world pixel by pixel.

It is trained on renders of split `judge` alone, with all colour-shape pairs, and is fixed before any
generated picture is scored; no checkpoint of the generator is ever chosen by it. `verdict.py` says what it
finds.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff_cache.flux_scenes.corpus import to_tensor
from mmdiff_cache.scenes import CLASS_NAMES, COLOURS, GROUNDS, SHAPES, TIMES, Scene, render_scene

log = logging.getLogger(__name__)

IGNORE = 255
_MAPS = {"classes": True, "colours": True, "grounds": False, "times": False}
"""Parts of a reading, and whether each is a map of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeRecipe:
    """How the judge is trained."""

    scenes: int = 6000
    steps: int = 3000
    batch: int = 12
    learning_rate: float = 2e-3
    object_weight: float = 4.0  # of an object's pixel, beside sky and ground: shapes are the hard part
    blurred: float = 0.5  # share of the pictures that are softened, as a decoder might
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Truths:
    """Renders and what is true of them, at half the pictures' resolution where there is one value a pixel."""

    pictures: NDArray[np.uint8]  # [B H W 3]
    classes: NDArray[np.uint8]  # [B H/2 W/2], numbers of CLASS_NAMES
    colours: NDArray[
        np.uint8
    ]  # [B H/2 W/2], numbers of COLOURS; IGNORE off the objects and where two could own it
    grounds: NDArray[np.uint8]  # [B]
    times: NDArray[np.uint8]  # [B]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the network says of a batch: logits."""

    classes: Tensor  # [B class H/2 W/2]
    colours: Tensor  # [B colour H/2 W/2]
    grounds: Tensor  # [B ground]
    times: Tensor  # [B time]


class Judge(nn.Module):
    """A U-shaped network with four heads."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 96)) -> None:
        super().__init__()
        ends = (3, *widths)
        self.down = nn.ModuleList(_block(a, b, stride=2) for a, b in zip(ends, widths, strict=False))
        self.up = nn.ModuleList(
            _block(a + b, b, stride=1) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.pixels = nn.Conv2d(widths[0], len(CLASS_NAMES) + len(COLOURS), 1)
        self.whole = nn.Linear(widths[-1] + widths[0], len(GROUNDS) + len(TIMES))

    def forward(self, pictures: Tensor) -> Reading:
        """Pictures [B 3 H W] in [-1, 1]."""
        levels: list[Tensor] = []
        x = pictures
        for block in self.down:
            x = block(x)
            levels.append(x)
        deepest = x.mean((2, 3))
        for block, level in zip(self.up, levels[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), level], 1))
        pixels = self.pixels(x)
        whole = self.whole(torch.cat([deepest, x.mean((2, 3))], 1))
        return Reading(
            classes=pixels[:, : len(CLASS_NAMES)],
            colours=pixels[:, len(CLASS_NAMES) :],
            grounds=whole[:, : len(GROUNDS)],
            times=whole[:, len(GROUNDS) :],
        )


def render_truths(split: str, indices: range) -> Truths:
    """Render scenes with what is true of them."""
    scenes = [render_scene(split, index) for index in indices]
    return Truths(
        pictures=np.stack([scene.image for scene in scenes]),
        classes=np.stack([scene.class_mask[::2, ::2] for scene in scenes]),
        colours=np.stack([colour_mask(scene)[::2, ::2] for scene in scenes]),
        grounds=np.array([GROUNDS.index(scene.ground) for scene in scenes], np.uint8),
        times=np.array([TIMES.index(scene.time_of_day) for scene in scenes], np.uint8),
    )


def colour_mask(scene: Scene) -> NDArray[np.uint8]:
    """Colour of each object's pixels where all objects of that shape have one colour; IGNORE elsewhere."""
    mask = np.full(scene.class_mask.shape, IGNORE, np.uint8)
    for shape in SHAPES:
        colours = {one.colour for one in scene.objects if one.shape == shape}
        if len(colours) == 1:
            mask[scene.class_mask == CLASS_NAMES.index(shape)] = COLOURS.index(colours.pop())
    return mask


def cached_truths(folder: Path, split: str, count: int) -> Truths:
    """`render_truths` of the first `count` scenes, kept in a file."""
    path = folder / f"truths-{split}-{count}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = render_truths(split, range(count))
        fields = ("pictures", "classes", "colours", "grounds", "times")
        np.savez(path, allow_pickle=False, **{name: getattr(found, name) for name in fields})
    return Truths(**np.load(path))


def train_judge(truths: Truths, recipe: JudgeRecipe, *, device: torch.device) -> Judge:
    """Train a judge from nothing."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    judge = Judge().to(device).train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, recipe.steps, pct_start=0.1
    )
    start = time.monotonic()
    for step in range(recipe.steps):
        chosen = torch.randint(len(truths.pictures), (recipe.batch,), generator=generator).numpy()
        loss = _loss(judge, truths, chosen, recipe, generator, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            log.info("judge step %d, loss %.4f, %.0f s", step, float(loss.detach()), time.monotonic() - start)
    return judge.eval()


def save_judge(judge: Judge, path: Path) -> None:
    """Write the weights in fp16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half().contiguous() for name, weight in judge.state_dict().items()}, path)


def load_judge(path: Path) -> Judge:
    """Read what `save_judge` wrote."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


@torch.no_grad()
def read(judge: Judge, pictures: NDArray[np.uint8], *, device: torch.device) -> Reading:
    """The reading of pictures, as log-probabilities on the CPU: the mean over picture and mirror image."""
    parts = [_read_both_ways(judge, part.to(device)) for part in to_tensor(pictures).split(32)]
    return Reading(**{name: torch.cat([part[name] for part in parts]).cpu() for name in _MAPS})


def _read_both_ways(judge: Judge, pictures: Tensor) -> dict[str, Tensor]:
    straight, mirrored = judge(pictures), judge(pictures.flip(-1))
    found: dict[str, Tensor] = {}
    for name, is_map in _MAPS.items():
        one, other = getattr(straight, name).softmax(1), getattr(mirrored, name).softmax(1)
        found[name] = ((one + (other.flip(-1) if is_map else other)) / 2).log()
    return found


def _loss(
    judge: Judge,
    truths: Truths,
    chosen: NDArray[np.int64],
    recipe: JudgeRecipe,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    pictures = to_tensor(truths.pictures[chosen])
    classes, colours = (torch.from_numpy(mask[chosen]).long() for mask in (truths.classes, truths.colours))
    mirror, soft = torch.rand(2, generator=generator).tolist()
    if mirror < 0.5:
        pictures, classes, colours = pictures.flip(-1), classes.flip(-1), colours.flip(-1)
    if soft < recipe.blurred:
        strength = soft / recipe.blurred
        blurred = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
        pictures = pictures + strength * (blurred - pictures)
    with torch.autocast(device.type, torch.bfloat16):
        found = judge(pictures.to(device).contiguous(memory_format=torch.channels_last))
    grounds, times = (
        torch.from_numpy(part[chosen]).long().to(device) for part in (truths.grounds, truths.times)
    )
    weights = torch.full((len(CLASS_NAMES),), recipe.object_weight, device=device)
    weights[: -len(SHAPES)] = 1.0  # sky and ground come first
    return (
        F.cross_entropy(found.classes.float(), classes.to(device), weights, ignore_index=IGNORE)
        + F.cross_entropy(found.colours.float(), colours.to(device), ignore_index=IGNORE)
        + 0.2 * F.cross_entropy(found.grounds.float(), grounds)
        + 0.2 * F.cross_entropy(found.times.float(), times)
    )


def _block(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )
