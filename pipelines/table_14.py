"""Another backbone (Tab. 14, App. G): Stable Diffusion 3.5 in the place of FLUX.1-dev, all else equal.

    mmdiff-cache table pipelines/table_14.py --data-root voc=DIR --data-root duts=DIR --data-root nyu=DIR
    mmdiff-cache table pipelines/table_14.py --backbone sd35-medium --data-root ...
    mmdiff-cache table pipelines/table_14.py --dataset scenes --backbone FOLDER    # any SD3 pipeline

Joint blocks at the relative depths of FLUX's single-stream blocks, four timesteps, concept maps. The paper
does not say which SD3.5; here it is the large one. The rows of FLUX are those of Tab. 4, for the claim
that SD3.5 does worse; no SD3 comes with this package. Disk and hours: `--dry-run`.
"""

from dataclasses import replace

from mmdiff_cache.experiments import Row, Table, World
from mmdiff_cache.experiments.table import claims, figures

SD3, SD3_DINO, FLUX, FLUX_DINO = "SD 3.5", "SD 3.5 + DINO-v3", "FLUX", "FLUX + DINO-v3"


def table(world: World) -> Table:
    """The paper's two rows, and those of FLUX."""
    dino = (world.encoder_name,)
    sd3 = replace(world, backbone=world.sd3)
    return Table(
        title="Tab. 14: SD 3.5",
        rows=(
            Row(
                name=SD3,
                trainings=sd3.trainings(),
                paper=figures(0.7014, 0.898, 0.912, 0.026, 0.1305, 0.401, 0.940, 0.973, 0.982),
            ),
            Row(
                name=SD3_DINO,
                trainings=sd3.trainings(discriminative=dino),
                paper=figures(0.8409, 0.915, 0.915, 0.019, 0.1296, 0.394, 0.948, 0.975, 0.982),
            ),
            Row(
                name=FLUX,
                trainings=world.trainings(),
                paper=figures(0.7890, 0.918, 0.929, 0.020, 0.1175, 0.370, 0.951, 0.976, 0.983),
            ),
            Row(
                name=FLUX_DINO,
                trainings=world.trainings(discriminative=dino),
                paper=figures(0.8495, 0.934, 0.947, 0.018, 0.1164, 0.365, 0.952, 0.976, 0.983),
            ),
        ),
        claims=(
            *claims(SD3_DINO, SD3, "App. G"),
            *claims(FLUX, SD3, "App. G"),
        ),
        notes=("SD3.5 has no single-stream blocks: its joint blocks stand at the same relative depths.",),
    )
