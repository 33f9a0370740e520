"""Whatever decides stored values is in the identity: a store made with another choice is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmdiff_cache.config import ExtractConfig, NoiseConfig
from mmdiff_cache.errors import StoreError
from mmdiff_cache.extraction.identity import build_manifest
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.run import load_extractor
from mmdiff_cache.store.manifest import compare
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import counted_files

CHANGES: dict[str, dict[str, object]] = {
    "noise.seed": {"noise": NoiseConfig(seed=1)},
    "noise.form": {"noise": NoiseConfig(form="vp")},
    "noise.shared": {"noise": NoiseConfig(shared=False)},
    "dtype": {"dtype": "bfloat16"},
    "resolution": {"resolution": 32},
    "prompts": {"prompts": "scene"},
    "guidance": {"guidance": 2.0},
    "text_length": {"text_length": 5},
    "quantisation": {"quantisation": "float8"},
    "stored_as": {"codec": "int8"},
}
SAME: dict[str, dict[str, object]] = {
    "batch_size": {"batch_size": 1, "partition_size": 2},
    "store": {"store": "elsewhere"},
    "device": {"device": "cpu"},
    "attention": {"attention": "_native_math"},
    "compile": {"compile": True},
    "text_pass": {"text_pass": "first"},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_store_of_another_identity_is_refused_and_left_alone(config: ExtractConfig, field: str) -> None:
    made = build_manifest(plan(config))
    open_writer(str(config.store), made).close()
    before = counted_files(Path(str(config.store)))
    asked = build_manifest(plan(replace(config, **CHANGES[field])))
    assert field in [d.field for d in compare(made, asked) if d.part == "identity"]
    assert asked.fingerprint != made.fingerprint
    for append in (False, True):
        with pytest.raises(StoreError, match=f"does not hold what is asked: identity .*{field}"):
            open_writer(str(config.store), asked, append=append)
    assert counted_files(Path(str(config.store))) == before


def test_the_manifest_and_the_loaded_model_say_the_same_of_themselves(config: ExtractConfig) -> None:
    for quantisation in ("none", "float8"):
        for dtype in ("float32", "bfloat16"):
            planned = plan(replace(config, quantisation=quantisation, dtype=dtype))
            stated = build_manifest(planned).identity
            loaded = load_extractor(planned.config, planned.backbone).backbone.identity()
            assert loaded.items() <= stated.items()


def test_kernels_are_provenance(config: ExtractConfig) -> None:
    made = build_manifest(plan(config))
    other = build_manifest(plan(replace(config, attention="_native_math", compile=True)))
    assert [(d.part, d.field) for d in compare(made, other)] == [
        ("provenance", "attention_backend"),
        ("provenance", "compiled"),
    ]
    assert not {"attention", "compile"} & made.config.keys()


@pytest.mark.parametrize("name", SAME)
def test_where_and_how_fast_it_runs_is_no_part_of_it(config: ExtractConfig, name: str) -> None:
    made, other = (build_manifest(plan(c)) for c in (config, replace(config, **SAME[name])))
    assert made.fingerprint == other.fingerprint
