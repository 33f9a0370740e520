"""What every published model needs here: whole weights, loaded in silence, and unrounded convolutions."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from mmdiff_cache.errors import BackboneError


def load_whole(model_class: Any, folder: Path, name: str, **options: Any) -> Any:
    """A model of diffusers or transformers, every weight of it from the safetensors files in a folder.

    Of a weight that the files lack, diffusers makes one without a value and transformers one of random
    numbers, neither with an error. Raises BackboneError for that, and for files that cannot be loaded.
    """
    try:
        with quiet_loading():
            model, found = model_class.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise BackboneError(f"the weights of {name} in {folder} cannot be loaded: {error}") from error
    if lacking := sorted([*found["missing_keys"], *found["mismatched_keys"]], key=str):
        raise BackboneError(f"the weights of {name} in {folder} lack {lacking[0]}; get them again")
    return model


@contextmanager
def quiet_loading() -> Generator[None]:
    """Hide the loaders' progress bars, and their remarks on the blocks that are left out on purpose."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        # Diffusers before 0.40 knows no other name for the argument.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        try:
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            for library, (verbosity, bars) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()


@contextmanager
def full_precision_convolutions() -> Generator[None]:
    """Keep a GPU from rounding convolutions to TF32, which would change values in the third digit."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield
