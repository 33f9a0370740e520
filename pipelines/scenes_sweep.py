"""Which timesteps, and which decoder? Eighteen depth heads on scenes that read the store together.

    mmdiff-cache extract --config pipelines/scenes.py              # once
    mmdiff-cache sweep --config pipelines/scenes_sweep.py --dry-run
    mmdiff-cache sweep --config pipelines/scenes_sweep.py          # stop it and run it again as you like
    mmdiff-cache compare runs/sweep-scenes_sweep
    mmdiff-cache sweep --config pipelines/scenes_sweep.py --set task=saliency --out runs/sweep-saliency

After the paper's ablation of timesteps (Tab. 5) and its choice of decoders (Sec. 3.4), three seeds each. All
runs have one `order_seed`, so their samples come in the same order and one reading serves all: a sample is
read once an epoch where eighteen single trainings would read it eighteen times. What still costs as much as
alone is the computing (docs/sweeps.md).

The learning rate is thirty times the paper's, for trainings as short as these. Results are in
runs/sweep-scenes_sweep: table.csv with every score, table.md, plot.png, and a folder a run that `evaluate`
and `predict` take like any other.
"""

from collections.abc import Mapping
from itertools import product

from mmdiff_cache.config import TrainConfig

TASK = "depth"
TIMESTEPS: Mapping[str, tuple[float, ...]] = {
    "the clearest": (0.001,),
    "one in the middle": (0.26,),
    "all four": (0.78, 0.52, 0.26, 0.001),
}
DECODERS = ("dpt", "linear")
SEEDS = (0, 1, 2)
STEPS = 500
LEARNING_RATE = 3e-3


def sweep() -> list[TrainConfig]:
    """Every choice of timesteps with every decoder, and each of these with every seed."""
    return [
        TrainConfig(
            task=TASK,
            timesteps=timesteps,
            decoder=decoder,
            steps=STEPS,
            learning_rate=LEARNING_RATE,
            seed=seed,
            order_seed=0,
        )
        for timesteps, decoder, seed in product(TIMESTEPS.values(), DECODERS, SEEDS)
    ]
