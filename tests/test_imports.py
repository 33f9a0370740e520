"""Who loads what: `--help` is quick, the store needs no torch, stage two never sees the backbone.

import-linter checks what is written in the source; these tests look at what a fresh interpreter really loads.
"""

import subprocess
import sys

import pytest

BACKBONE_SIDE = {"diffusers", "transformers", "dask", "distributed"}


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint()\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    return set(output.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["extract", "--help"],
        ["--version"],
        ["predict", "--help"],
        ["sweep", "--help"],
        ["table", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"from mmdiff_cache.cli.app import run\nassert run({arguments!r}) == 0"
    assert not loaded_by(code) & {"torch", "numpy", "zarr", *BACKBONE_SIDE}


@pytest.mark.parametrize("module", ["store.reader", "store.writer", "store.summary", "datasets.registry"])
def test_the_store_and_the_data_sets_load_no_torch(module: str) -> None:
    assert not loaded_by(f"import mmdiff_cache.{module}") & {"torch", *BACKBONE_SIDE}


def test_stage_one_loads_dask_only_where_there_is_a_cluster() -> None:
    assert not loaded_by("import mmdiff_cache.extraction.run") & {"dask", "distributed"}


def test_sweeps_load_dask_only_where_there_is_a_cluster() -> None:
    assert not loaded_by("import mmdiff_cache.sweeps") & {"dask", "distributed", "diffusers"}


@pytest.mark.parametrize("module", ["training.run", "training.evaluate", "loader", "tasks"])
def test_stage_two_loads_no_backbone(module: str) -> None:
    assert not loaded_by(f"import mmdiff_cache.{module}") & BACKBONE_SIDE


@pytest.mark.parametrize("module", ["models.mmdiff", "losses", "metrics"])
def test_models_losses_and_metrics_load_no_zarr(module: str) -> None:
    assert not loaded_by(f"import mmdiff_cache.{module}") & {"zarr", *BACKBONE_SIDE}
