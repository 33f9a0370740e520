"""Text encoders that go first: the same store byte for byte, scratch that is counted and gone afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmdiff_cache.backbones.registry import describe, load_backbone, load_text_encoders
from mmdiff_cache.backbones.text import SavedText
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.errors import BackboneError, StorageRefused
from mmdiff_cache.extraction import memory
from mmdiff_cache.extraction.identity import build_manifest
from mmdiff_cache.extraction.memory import choose_text_pass, fits, free_memory
from mmdiff_cache.extraction.plan import check_disk, plan
from mmdiff_cache.extraction.run import extract
from mmdiff_cache.extraction.text_pass import distinct_prompts, text_of
from mmdiff_cache.store.records import Partition
from mmdiff_cache.store.writer import open_writer
from tests.tiny_sd3 import save_tiny_sd3


def contents(store: Path) -> dict[str, bytes]:
    files = (path.relative_to(store) for path in store.rglob("*") if path.is_file())
    return {str(f): (store / f).read_bytes() for f in files if f.parts[0] not in ("logs", "lock")}


def both_ways(config: ExtractConfig, folder: Path) -> list[dict[str, bytes]]:
    return [
        contents(extract(replace(config, text_pass=way, store=str(folder / way))).path)
        for way in ("together", "first")
    ]


@pytest.fixture
def prompts(config: ExtractConfig, tmp_path: Path) -> Path:
    """Five samples with three prompts."""
    ids = plan(config).samples["val"]
    lines = [{"sample_id": name, "prompt": f"a {'abc'[n % 3]} near"} for n, name in enumerate(ids)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("rule", ["empty", "scene", "file"])
def test_the_store_has_the_same_bytes_either_way(
    rule: str, config: ExtractConfig, prompts: Path, tmp_path: Path
) -> None:
    together, first = both_ways(replace(config, prompts=str(prompts) if rule == "file" else rule), tmp_path)
    assert together == first
    assert not list((tmp_path / "first" / "staging").iterdir())


def test_so_it_is_for_sd3(config: ExtractConfig, tmp_path: Path) -> None:
    folder = save_tiny_sd3(tmp_path / "tiny-sd3")
    layers = ("double.0", "double.3")
    together, first = both_ways(replace(config, backbone=str(folder), layers=layers, limit=2), tmp_path)
    assert together == first


def test_neither_pass_holds_what_the_other_needs(tiny_flux_folder: Path) -> None:
    info = describe(str(tiny_flux_folder))
    encoders = load_text_encoders(info)
    assert encoders._pipeline.transformer is None
    assert encoders._pipeline.vae is None
    alone = load_backbone(info, text=SavedText(tiny_flux_folder, device=encoders.device))
    assert alone.blocks.keys() == load_backbone(info).blocks.keys()
    with pytest.raises(BackboneError, match="was not encoded"):
        alone.encode_prompts(["near"])


def test_the_plan_counts_the_scratch_and_the_run_removes_it(config: ExtractConfig, prompts: Path) -> None:
    planned = plan(replace(config, prompts=str(prompts), text_pass="first", concepts={}))
    assert "encoders first and alone, at most" in str(planned)
    assert plan(replace(config, text_pass="together")).scratch_bytes == 0
    pending = [Partition(split="val", index=0, start=0, stop=5)]
    assert len(distinct_prompts(planned, pending)) == 3
    with open_writer(planned.store, build_manifest(planned)):
        with text_of(planned, pending):
            files = list((planned.store / "staging").rglob("*.safetensors"))
            headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
            assert sum(file.stat().st_size for file in files) - headers == planned.scratch_bytes
        assert not list((planned.store / "staging").iterdir())


def test_what_an_interruption_leaves_goes_with_the_next_run(config: ExtractConfig) -> None:
    first = replace(config, text_pass="first")
    store = extract(first).path
    left = store / "staging" / "text-123-0123abcd"  # the name that staging_folder gives
    left.mkdir()
    (left / "prompt-0.safetensors").write_bytes(b"x")
    extract(first)
    assert not list((store / "staging").iterdir())


def test_a_disk_without_room_for_the_scratch_is_refused(config: ExtractConfig) -> None:
    planned = plan(replace(config, text_pass="first"))
    assert planned.scratch_bytes > 0
    with pytest.raises(StorageRefused):
        check_disk(replace(planned, free_bytes=planned.stored_bytes + planned.scratch_bytes - 1))
    check_disk(replace(planned, free_bytes=planned.stored_bytes + planned.scratch_bytes))


def test_the_way_follows_from_the_memory(monkeypatch: pytest.MonkeyPatch, tiny_flux_folder: Path) -> None:
    info = describe(str(tiny_flux_folder))
    assert choose_text_pass(info, "cpu") == "together"
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 10)
    assert choose_text_pass(info, "cpu") == "first"
    assert choose_text_pass(describe("flux-dev"), "cpu") == "together", "unknown until the weights are here"


def test_a_fifth_of_the_memory_is_left_for_activations() -> None:
    assert fits(8, 10)
    assert not fits(9, 10)
    assert fits(1 << 60, None)
    assert (free_memory("cpu") or 0) > 1 << 20
