"""What a person chooses, as frozen values: each checks itself and goes to JSON and back.

None means 'the default of the data set, the backbone or the task'. `resolve` (extraction.plan, training.run)
fills every None; only resolved configurations are stored.
"""

from .base import Config, data_folder, filled
from .extract import CaptureMode, Codec, ExtractConfig, Fit, GenerationConfig, NoiseConfig, NoiseForm
from .train import (
    AggregatorConfig,
    ConceptMapsConfig,
    DecoderName,
    EmaConfig,
    Source,
    TrainConfig,
    VariantUse,
)

__all__ = [
    "AggregatorConfig",
    "CaptureMode",
    "Codec",
    "ConceptMapsConfig",
    "Config",
    "DecoderName",
    "EmaConfig",
    "ExtractConfig",
    "Fit",
    "GenerationConfig",
    "NoiseConfig",
    "NoiseForm",
    "Source",
    "TrainConfig",
    "VariantUse",
    "data_folder",
    "filled",
]
