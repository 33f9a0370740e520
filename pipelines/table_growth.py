"""Dose and response (App. G): do features, fusion and concept maps gain as the generator trains?

    python pipelines/flux_scenes.py --work flux-work --share 0.1         # a quarter of an hour, one thread
    python pipelines/flux_scenes.py --work flux-work --share 0.3         # three quarters
    mmdiff-cache table pipelines/table_growth.py --dataset scenes        # hours on two cores; goes on

The same rows on a backbone of initial weights, on two that trained for a tenth and three tenths of the steps
of the bundled recipe, each to the end of its own falling rate, and on the bundled one, which had 1,482 and
5,000 steps. All share one autoencoder. A younger one that is not there is told and left out.

Claims, fixed before any run: on four timesteps each age scores better than the one before; at every age four
timesteps score better than the best single one, and with concept maps better than without; and both gains
are larger at each age than at the one before. The single t is the trained backbone's best at every age, so
that of a younger one may be too low, and its gain too high.
"""

from dataclasses import replace

from mmdiff_cache.experiments import Claim, Row, Table, World
from mmdiff_cache.experiments.control_backbones import random_backbone, younger_backbone
from mmdiff_cache.experiments.table import METRICS, claims
from mmdiff_cache.loader.inputs import NO_CONCEPTS

BEST = {"segmentation": 0.35, "saliency": 0.15, "depth": 0.15}
"""The single t of each task, as in table_controls.py."""
SHARES = (0.1, 0.3)
WITH, FOUR, SINGLE = "four timesteps + concepts", "four timesteps", "best single t"
GAINS = ((FOUR, SINGLE), (WITH, FOUR))


def backbones(name: str) -> dict[str, str]:
    """By age."""
    younger = {f"{share:.0%} of its training": younger_backbone(name, share) for share in SHARES}
    return {"never trained": random_backbone(name), **younger, "trained": name}


def rows(world: World, age: str) -> list[Row]:
    """Three rows of one age."""
    single = tuple(world.training(task, concepts=NO_CONCEPTS, timesteps=(t,)) for task, t in BEST.items())
    trainings = {
        WITH: world.trainings(),
        FOUR: world.trainings(concepts=NO_CONCEPTS),
        SINGLE: single,
    }
    return [Row(name=f"{age}: {name}", trainings=found, paper={}) for name, found in trainings.items()]


def table(world: World) -> Table:
    """Twelve rows, of which the paper has no figures."""
    ages = backbones(world.backbone)
    steps = list(zip(list(ages)[1:], ages, strict=False))
    older: list[Claim] = [
        claim for age, before in steps for claim in claims(f"{age}: {FOUR}", f"{before}: {FOUR}", "App. G")
    ]
    best = ", ".join(f"{task} {BEST[task]:g}" for task in METRICS)
    gains = [
        claim
        for age in ages
        for better, worse in GAINS
        for claim in claims(f"{age}: {better}", f"{age}: {worse}", "Sec. 3, at this age")
    ]
    growing = [
        replace(claim, beyond=(f"{before}: {better}", f"{before}: {worse}"))
        for age, before in steps
        for better, worse in GAINS
        for claim in claims(f"{age}: {better}", f"{age}: {worse}", "App. G, the gain itself")
    ]
    return Table(
        title="Dose and response: the generator's training",
        rows=tuple(row for age, name in ages.items() for row in rows(world.with_control(name), age)),
        claims=(*older, *gains, *growing),
        notes=(f"Best single t: {best}, those of the trained one.",),
    )
