"""Controls that the paper lacks: what of a row is the timesteps, what the words, what the trained backbone?

    mmdiff-cache table pipelines/table_controls.py --dataset scenes --dry-run    # the plan
    mmdiff-cache table pipelines/table_controls.py --dataset scenes              # hours on two cores; goes on
    mmdiff-cache table pipelines/table_controls.py --dataset scenes --row "noise draws" --row "four timesteps"

Claims, fixed before any run: the first row of each pair scores better on the test pictures by the task's
headline (mIoU over shapes, S-measure, AbsRel). Test: the paired bootstrap over them, 10,000 draws; confirmed
where its 95 % interval lies above zero in every seed, refuted where below in every seed, else open.

- Timesteps: without concept maps, four timesteps against the best single one; against four noise draws of
  that one and against that one four times, both through the same aggregator with as many parameters, which in
  turn stand against that one once; against equal weights in the same aggregator; against the plain mean and
  against all side by side, which have none of it.
- Words: with four timesteps, concept maps against none, against those of another picture, against those of
  words that name nothing, and against cross-attention.
- Backbone: the same heads on a transformer of initial weights, on the clean VAE latent, and a small U-Net on
  the pictures.

Every training of a task has the same pictures, batches and steps. The best single t is the one with the best
held-out score in table_timesteps.py, not on the scenes that are scored. Whether the maps
themselves lie on what their words name, without training: pipelines/concept_maps.py.
"""

from collections.abc import Mapping
from typing import Any

from mmdiff_cache.config import AggregatorConfig, ConceptMapsConfig
from mmdiff_cache.datasets.concepts import DEFAULT
from mmdiff_cache.experiments import Row, Table, Training, World
from mmdiff_cache.experiments.control_backbones import random_backbone
from mmdiff_cache.experiments.table import METRICS, claims
from mmdiff_cache.loader.inputs import CROSS_ATTENTION, NO_CONCEPTS
from mmdiff_cache.training.pixels import LEARNING_RATE

BEST = {"segmentation": 0.35, "saliency": 0.15, "depth": 0.15}
"""The single t of each task."""
COUNT = 4
"""Draws and repetitions: as many as there are timesteps."""
WITH, WITHOUT = "four timesteps + concepts", "four timesteps"
SINGLE, DRAWS, REPEATED = "best single t", "four noise draws of the best t", "the best t four times"
EQUAL = "four timesteps, equal weights"
MEAN, CONCAT = "four timesteps, plain mean", "four timesteps, side by side"
SHUFFLED, UNTRAINED = "four timesteps + maps of other pictures", "four timesteps + words that name nothing"
CROSS = "four timesteps + cross-attention"
RANDOM, LATENT, PIXELS = "random backbone, four timesteps", "VAE latent", "small U-Net on pixels"
CLAIMS = (
    (WITHOUT, SINGLE, "Sec. 3.1, without concepts"),
    (WITHOUT, DRAWS, "ours: timesteps, not draws"),
    (WITHOUT, REPEATED, "ours: timesteps, not parameters"),
    (WITHOUT, EQUAL, "Sec. 3.1: weights by pixel"),
    (WITHOUT, MEAN, "Sec. 3.1: the aggregator"),
    (WITHOUT, CONCAT, "Tab. 5, without concepts"),
    (WITH, WITHOUT, "Sec. 3.2, like for like"),
    (WITH, SHUFFLED, "ours: this picture's maps"),
    (WITH, UNTRAINED, "ours: the words' meaning"),
    (WITH, CROSS, "Sec. 4.5, at four timesteps"),
    (DRAWS, SINGLE, "ours: what draws alone bring"),
    (REPEATED, SINGLE, "ours: what parameters alone bring"),
    (WITHOUT, RANDOM, "ours: training of the backbone"),
    (WITHOUT, LATENT, "ours: the transformer, and timesteps"),
    (SINGLE, LATENT, "ours: the transformer"),
    (WITHOUT, PIXELS, "ours: the features"),
)
"""Better, worse, and where the paper says so."""


def table(world: World) -> Table:
    """Fourteen rows, of which the paper has no figures."""
    plain = {"concepts": NO_CONCEPTS}
    random = world.with_control(random_backbone(world.backbone))
    rows = {
        WITH: world.trainings(),
        WITHOUT: world.trainings(**plain),
        SINGLE: at_best(world, 1, plain),
        DRAWS: at_best(world, 1, {**plain, "variants": tuple(range(COUNT)), "variant_use": "stack"}),
        REPEATED: at_best(world, COUNT, plain),
        EQUAL: world.trainings(**plain, aggregator=AggregatorConfig(weighing="equal")),
        MEAN: world.trainings(**plain, aggregator=AggregatorConfig(kind="mean")),
        CONCAT: world.trainings(**plain, aggregator=AggregatorConfig(kind="concat")),
        SHUFFLED: world.trainings(concept_maps=ConceptMapsConfig(shuffled=True)),
        UNTRAINED: tuple(
            world.training(task, concepts=f"untrained-{len(DEFAULT[task])}") for task in METRICS
        ),
        CROSS: world.trainings(concepts=CROSS_ATTENTION),
        RANDOM: random.trainings(**plain),
        LATENT: world.trainings(**plain, source="latents"),
        PIXELS: world.trainings(**plain, source="images", learning_rate=LEARNING_RATE),
    }
    return Table(
        title="Controls: timesteps, words, backbone",
        rows=tuple(Row(name=name, trainings=trainings, paper={}) for name, trainings in rows.items()),
        claims=tuple(claim for pair in CLAIMS for claim in claims(*pair)),
        notes=(
            "Without prompts, the default on scenes, cross-attention is attention to end and padding tokens.",
            f"Best single t: {', '.join(f'{task} {t:g}' for task, t in BEST.items())}, fixed before the run.",
            "Four draws, and one t four times, have exactly the parameters of four timesteps; plain mean, "
            "side by side, VAE latent and U-Net have others, and each map beside adds a few, at equal steps.",
            "The U-Net trains at its own learning rate; all else is one setting.",
        ),
    )


def at_best(world: World, times: int, choices: Mapping[str, Any]) -> tuple[Training, ...]:
    """Trainings on the best single t of each task, given this often, with these choices for the rest."""
    return tuple(world.training(task, **{**choices, "timesteps": (t,) * times}) for task, t in BEST.items())
