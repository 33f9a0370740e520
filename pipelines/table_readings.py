"""Where the paper leaves a choice open: what does the other reading do (docs/paper-notes.md)?

    mmdiff-cache table pipelines/table_readings.py --dataset scenes --dry-run    # the plan
    mmdiff-cache table pipelines/table_readings.py --dataset scenes              # hours on two cores; goes on
    mmdiff-cache table pipelines/table_readings.py --dataset scenes --row "App. F" --row "skip"   # one

The first row has every default; each other one changes one choice, or, in "Sec. 3.1", the five in which the
paper's two descriptions of the aggregator differ. "Decoders at half the rate" is the paper's own word (Sec.
3.4); the small world has one rate for all, since its trainings are short. Claims, fixed before any run: the
default scores better. They are ours: the paper says nothing of the kind, and a default may stay where it
loses in small. On depth alone, whose score differs least between seeds, so that small effects show.
"""

from typing import Any

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.config import AggregatorConfig, ConceptMapsConfig, EmaConfig
from mmdiff_cache.experiments import Row, Table, World
from mmdiff_cache.experiments.table import claims
from mmdiff_cache.experiments.world import CLEAREST

DEFAULT = "App. F, all defaults"
TASK = "depth"


def readings(world: World) -> dict[str, dict[str, Any]]:
    """Fields that differ from the default, by row."""
    double = describe(world.backbone).double_blocks
    return {
        DEFAULT: {},
        "Sec. 3.1": {"aggregator": AggregatorConfig(preset="section_3_1")},
        "LayerScale from 1e-4": {"aggregator": AggregatorConfig(layer_scale=1e-4)},
        "norm after the projection": {"aggregator": AggregatorConfig(norm="after_projection")},
        "weights on projected features": {"aggregator": AggregatorConfig(weights_on="projected")},
        "plain skip": {"aggregator": AggregatorConfig(skip="plain")},
        "CBAM before the skip": {"aggregator": AggregatorConfig(cbam="before_skip")},
        "no norm": {"aggregator": AggregatorConfig(norm="none")},
        "one weight a timestep, as in Diffusion Hyperfeatures": {
            "aggregator": AggregatorConfig(kind="global")
        },
        "concept maps: mean, then softmax": {"concept_maps": ConceptMapsConfig(reading="mean_then_softmax")},
        "concept maps of the cleanest t": {"concept_maps": ConceptMapsConfig(timesteps=CLEAREST)},
        "concept maps of all double blocks": {"concept_maps": ConceptMapsConfig(blocks=double)},
        "concept maps, scores divided by 10": {"concept_maps": ConceptMapsConfig(temperature=10.0)},
        "DeepLabV3+": {"decoder": "deeplabv3plus"},
        "linear decoder": {"decoder": "linear"},
        "decoders at half the rate": {"decoder_rate": 0.5},
        "constant EMA": {"ema": EmaConfig(warmup=False)},
        "standardised features": {"standardise": True},
    }


def table(world: World) -> Table:
    """Eighteen rows, of which the paper has no figures."""
    found = readings(world)
    return Table(
        title="Open readings of the paper",
        rows=tuple(
            Row(name=name, trainings=(world.training(TASK, **choice),), paper={})
            for name, choice in found.items()
        ),
        claims=tuple(
            claim
            for name in found
            if name != DEFAULT
            for claim in claims(DEFAULT, name, "ours: a reading", (TASK,))
        ),
    )
