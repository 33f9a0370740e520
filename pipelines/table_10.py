"""One decoder for several tasks (Tab. 10, App. C): does joint training help segmentation and harm depth?

    mmdiff-cache table pipelines/table_10.py --data-root voc=DIR --data-root duts=DIR --data-root nyu=DIR
    mmdiff-cache table pipelines/table_10.py --dataset scenes                    # in small
    mmdiff-cache table pipelines/table_10.py --dataset scenes --row "without"    # without DINOv3 alone

The paper's rows have DINOv3's features beside the others; each is also run without them. A unified run has
the sum of the steps that its tasks have alone, and the concepts `unified`. VOC, DUTS and NYU are three
sets of pictures, none with two labels. Where one data set has all labels, as scenes do, its samples are dealt
out, and every task has a third of them in every row, though not the same third. A unified model has the
first task's decoder and the unified words; a single one has its own. So there is also a row of single models
with that decoder and those words, from which unified ones differ in their company alone.
Disk and hours: `--dry-run`. Results of the small world stand in docs/experiments.md.
"""

from mmdiff_cache.experiments import Row, Table, Training, World
from mmdiff_cache.experiments.table import METRICS, Claim, Figures, figures
from mmdiff_cache.training.unified import VOCABULARY

SEGMENTATION, SALIENCY, DEPTH = METRICS
SETS = {
    "single-task": (),
    "segmentation + saliency": (SEGMENTATION, SALIENCY),
    "segmentation + depth": (SEGMENTATION, DEPTH),
    "all three": (SEGMENTATION, SALIENCY, DEPTH),
}
SINGLE, WITH_SALIENCY, WITH_DEPTH, ALL = SETS
PAPER: dict[str, Figures] = {
    SINGLE: figures(0.8495, 0.934, 0.947, 0.018, 0.116, 0.365, 0.952, 0.976, 0.983),
    WITH_SALIENCY: {
        SEGMENTATION: {"miou": 0.8492},
        SALIENCY: {"s_measure": 0.925, "max_f": 0.946, "mae": 0.022},
    },
    WITH_DEPTH: {
        SEGMENTATION: {"miou": 0.8542},
        DEPTH: {"abs_rel": 0.190, "rmse": 0.505, "delta1": 0.861, "delta2": 0.950, "delta3": 0.978},
    },
    ALL: figures(0.8496, 0.929, 0.947, 0.020, 0.220, 0.579, 0.736, 0.920, 0.960),
}
CLAIMS = ((WITH_DEPTH, SINGLE, SEGMENTATION), (SINGLE, WITH_DEPTH, DEPTH), (SINGLE, ALL, DEPTH))
"""Better, worse, on which task."""
WITHOUT = ", without DINO-v3"
ALIKE = f"single-task, unified words and decoder{WITHOUT}"
ALIKE_CLAIMS = (
    (WITH_DEPTH + WITHOUT, ALIKE, SEGMENTATION),
    (ALIKE, WITH_DEPTH + WITHOUT, DEPTH),
    (ALIKE, ALL + WITHOUT, DEPTH),
)
"""The same, where all else is alike."""


def trainings(world: World, tasks: tuple[str, ...], encoders: tuple[str, ...]) -> tuple[Training, ...]:
    """One model for the tasks, or one for each of all; every task has as many pictures in each case."""
    each = world.share(len(METRICS))
    if not tasks:
        return world.trainings(limit=each, discriminative=encoders)
    limit = None if each is None else each * len(tasks)
    return (world.together(*tasks, limit=limit, discriminative=encoders),)


def table(world: World) -> Table:
    """Four rows with DINOv3 and the same without, and single models that are like the unified ones."""
    dino = (world.encoder_name,)
    alike = world.trainings(limit=world.share(len(METRICS)), concepts=VOCABULARY, decoder="deeplabv3plus")
    asked = [
        *((better, worse, task, "App. C") for better, worse, task in CLAIMS),
        *((b + WITHOUT, w + WITHOUT, task, "App. C, without DINO-v3") for b, w, task in CLAIMS),
        *((better, worse, task, "ours: company alone") for better, worse, task in ALIKE_CLAIMS),
    ]
    return Table(
        title="Tab. 10: single- and multi-task decoders",
        rows=(
            *(
                Row(name=name, trainings=trainings(world, tasks, dino), paper=PAPER[name])
                for name, tasks in SETS.items()
            ),
            *(
                Row(name=name + WITHOUT, trainings=trainings(world, tasks, ()), paper={})
                for name, tasks in SETS.items()
            ),
            Row(name=ALIKE, trainings=alike, paper={}),
        ),
        claims=tuple(
            Claim(better=better, worse=worse, task=task, metric=METRICS[task][0], source=source)
            for better, worse, task, source in asked
        ),
        notes=(
            "How the paper mixes batches, weighs losses and chooses concepts is open: docs/paper-notes.md.",
        ),
    )
