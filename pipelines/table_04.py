"""The paper's own rows of Tab. 4: its features alone, with DINOv3 beside them, and DINOv3 alone.

    mmdiff-cache table pipelines/table_04.py --data-root voc=DIR --data-root duts=DIR --data-root nyu=DIR
    mmdiff-cache table pipelines/table_04.py --dataset scenes      # in small; DINOv3 with --encoder FOLDER

| row | features | encoder |
|---|---|---|
| MMDiff | four single-stream layers at four timesteps, concept maps | - |
| MMDiff + DINO-v3 | the same | DINOv3 ViT-B/16, blocks 2 and 11 |
| DINO-v3 | - | the same alone, through the same aggregators and decoders |

The other rows of the table are other people's methods. Disk and hours: `--dry-run`. Results of the small
world stand in docs/experiments.md.
"""

from mmdiff_cache.experiments import Row, Table, World
from mmdiff_cache.experiments.table import claims, figures

ALONE, BOTH, DINO = "MMDiff", "MMDiff + DINO-v3", "DINO-v3"


def table(world: World) -> Table:
    """Three rows."""
    dino = (world.encoder_name,)
    return Table(
        title="Tab. 4: quality of features (own rows)",
        rows=(
            Row(
                name=ALONE,
                trainings=world.trainings(),
                paper=figures(0.7890, 0.918, 0.929, 0.020, 0.1175, 0.370, 0.951, 0.976, 0.983),
            ),
            Row(
                name=BOTH,
                trainings=world.trainings(discriminative=dino),
                paper=figures(0.8495, 0.934, 0.947, 0.018, 0.1164, 0.365, 0.952, 0.976, 0.983),
            ),
            Row(
                name=DINO,
                trainings=world.trainings(source="discriminative", discriminative=dino, concepts="none"),
                paper=figures(0.8309, 0.920, 0.922, 0.021, 0.1288, 0.389, 0.945, 0.975, 0.983),
            ),
        ),
        claims=(*claims(BOTH, ALONE, "Sec. 4.4"), *claims(BOTH, DINO, "Sec. 4.4")),
        notes=(
            "The paper trains the encoder of its row DINO-v3; here it is frozen, as in the other rows.",
            "MMDiff + DINO-v3 has 84.95 mIoU in the paper's tables and 84.44 in its text.",
        ),
    )
