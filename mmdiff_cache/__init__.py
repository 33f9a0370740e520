"""mmdiff-cache: run a diffusion transformer once, keep its features, train heads on them as often as you
like.

The ten public names below load their module when first used, so that `import mmdiff_cache` costs nothing and
training never loads the backbone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ExtractConfig, TrainConfig
    from .extraction.plan import plan
    from .extraction.run import extract
    from .inference.predict import load_model, predict
    from .loader import CachedFeatureDataset
    from .store.reader import open_store
    from .training.evaluate import evaluate
    from .training.run import train

__version__ = "0.1.0"

__all__ = [
    "CachedFeatureDataset",
    "ExtractConfig",
    "TrainConfig",
    "evaluate",
    "extract",
    "load_model",
    "open_store",
    "plan",
    "predict",
    "train",
]

_HOME = {
    "CachedFeatureDataset": "loader",
    "ExtractConfig": "config",
    "TrainConfig": "config",
    "evaluate": "training.evaluate",
    "extract": "extraction.run",
    "load_model": "inference.predict",
    "open_store": "store.reader",
    "plan": "extraction.plan",
    "predict": "inference.predict",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
