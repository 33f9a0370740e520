"""Score against t: each of nine timesteps alone, and the paper's four together.

    mmdiff-cache table pipelines/table_timesteps.py --dataset scenes --dry-run   # the plan
    mmdiff-cache table pipelines/table_timesteps.py --dataset scenes             # hours on two cores; goes on

Without concept maps, so that a row is what its timesteps know and nothing else. The nine are the paper's four
and five between and beside them. Claims, fixed before any run: four together score better than each alone
(Sec. 3.1: what is known is spread over the trajectory), and a t in the middle better than the cleanest
(Sec. 4.5: t = 0 alone misses the coarse information of earlier steps).
"""

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.experiments import Row, Table, World
from mmdiff_cache.experiments.table import claims
from mmdiff_cache.loader.inputs import NO_CONCEPTS

NINE = (0.9, 0.78, 0.64, 0.52, 0.35, 0.26, 0.15, 0.05, 0.001)
FOUR = "four timesteps"
MIDDLE, CLEANEST = 0.26, 0.001


def name(t: float) -> str:
    """Name of a single timestep's row."""
    return f"t = {t:g}"


def table(world: World) -> Table:
    """Ten rows, of which the paper has no figures."""
    sets = {FOUR: describe(world.backbone).timesteps, **{name(t): (t,) for t in NINE}}
    return Table(
        title="Score against t",
        rows=tuple(
            Row(name=title, trainings=world.trainings(concepts=NO_CONCEPTS, timesteps=timesteps), paper={})
            for title, timesteps in sets.items()
        ),
        claims=(
            *(claim for t in NINE for claim in claims(FOUR, name(t), "Sec. 3.1")),
            *claims(name(MIDDLE), name(CLEANEST), "Sec. 4.5, without concepts"),
        ),
    )
