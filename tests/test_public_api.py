"""The root package offers exactly ten names, and loads nothing before one of them is used."""

import subprocess
import sys

import pytest

import mmdiff_cache

NAMES = {
    "ExtractConfig",
    "TrainConfig",
    "plan",
    "extract",
    "open_store",
    "CachedFeatureDataset",
    "train",
    "evaluate",
    "load_model",
    "predict",
}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", script], text=True).split())


def test_there_are_ten_names_and_they_do_not_change_by_accident() -> None:
    assert set(mmdiff_cache.__all__) == NAMES
    assert len(mmdiff_cache.__all__) == len(NAMES)
    assert set(dir(mmdiff_cache)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_can_be_used(name: str) -> None:
    assert callable(getattr(mmdiff_cache, name))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'exract'"):
        mmdiff_cache.exract  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import mmdiff_cache")
    assert not loaded & {"numpy", "torch", "zarr", "dask", "diffusers", "transformers", "typer", "rich"}


def test_the_version_is_that_of_the_installed_distribution() -> None:
    from importlib.metadata import version

    assert version("mmdiff-cache") == mmdiff_cache.__version__
