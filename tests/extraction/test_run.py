"""Stage one as a whole on a tiny FLUX: what is stored, skipped and refused, and that nothing is lost."""

import json
import os
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdiff_cache.config import ExtractConfig, NoiseConfig
from mmdiff_cache.errors import BackboneError, DataError, StorageError, StoreError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.extraction.run import extract, load_extractor
from mmdiff_cache.extraction.worker import load_batch
from mmdiff_cache.records import PreparedSample
from mmdiff_cache.store.reader import Store

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five small pictures; the second half of the third is missing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def cut(file: Path) -> bytes:
    """Cut a file in half; returns what it held."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return content


def contents(store: str | None) -> dict[str, bytes]:
    """Every file of a store but its logs and lock."""
    root = Path(str(store))
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(f): (root / f).read_bytes() for f in files if f.parts[0] not in ("logs", "lock")}


def features(store: Store, split: str, samples: list[int]) -> np.ndarray:
    return store[split].hidden_states(samples).view(np.uint16)


def test_the_store_holds_what_the_extractor_gives(config: ExtractConfig) -> None:
    """The last batch holds one sample and is padded: its features are those of the padded forward."""
    planned = plan(config)
    store = extract(planned)
    assert store["val"].ids == planned.samples["val"]
    assert store["val"].finished == (0, 1, 2, 3, 4)
    extractor = load_extractor(planned.config, planned.backbone)
    for positions in ([0, 1], [2, 3], [4, 4]):
        batch = [s for s in load_batch(planned, "val", positions) if isinstance(s, PreparedSample)]
        direct = extractor(batch)
        stored = sorted(set(positions))
        rows = len(stored)
        np.testing.assert_array_equal(
            features(store, "val", stored), direct.hidden_states[:rows, 0].view(np.uint16)
        )
        np.testing.assert_array_equal(
            store["val"].concept_scores("two", stored), direct.concept_scores["two"][:rows, 0]
        )
        np.testing.assert_array_equal(store["val"].latents(stored), direct.latents[:rows])
        np.testing.assert_array_equal(store["val"].images(stored), [sample.image for sample in batch[:rows]])
        np.testing.assert_array_equal(
            store["val"].labels("depth", stored), [sample.labels["depth"] for sample in batch[:rows]]
        )
        np.testing.assert_array_equal(
            store["val"].original_label("depth", stored[0]), batch[0].labels["depth"]
        )


def test_progress_tells_every_batch_and_a_second_run_does_nothing(config: ExtractConfig) -> None:
    told: list[tuple[int, int]] = []
    extract(config, lambda done, total, state: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    before = contents(config.store)
    told.clear()
    store = extract(config, lambda done, total, state: told.append((done, total)))
    assert told == []
    assert contents(config.store) == before
    assert store.samples_done == 5
    log = (store.path / "logs" / "extract.log").read_text()
    assert "5 of 5 samples to extract" in log
    assert "partition val-000002 is complete" in log


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_interruption_is_quick_and_the_next_run_goes_on(
    config: ExtractConfig, tmp_path: Path, batches: int
) -> None:
    def press_ctrl_c(done: int, total: int, state: str) -> None:
        if done >= 2 * batches:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        extract(config, press_ctrl_c)
    assert plan(config).done == 2 * max(batches - 1, 0)
    log = (Path(str(config.store)) / "logs" / "extract.log").read_text()
    assert log.endswith("stopped: KeyboardInterrupt\n")
    told: list[int] = []
    store = extract(config, lambda done, total, state: told.append(done))
    # The partition whose batch was just reported was not committed yet, so it is done again.
    assert told[0] == 2 * max(batches - 1, 0)
    undisturbed = replace(config, store=str(tmp_path / "undisturbed"))
    extract(undisturbed)
    assert contents(config.store) == contents(undisturbed.store)
    assert store.samples_done == 5


def test_a_picture_that_is_cut_off_fails_alone_and_by_name(config: ExtractConfig, pictures: Path) -> None:
    folder = replace(config, dataset="images", data_root=str(pictures), splits=None, limit=None, store=None)
    whole = extract(replace(folder, store=f"{config.store}-whole"))
    content = cut(pictures / "2.png")
    mended = replace(folder, store=config.store)
    store = extract(mended)
    assert store["all"].finished == (0, 1, 3, 4)
    assert list(store["all"].failed) == [2]
    assert "2.png: cannot be decoded" in store["all"].failed[2]
    (listed,) = (store.path / "failures" / "all-000001.jsonl").read_text().splitlines()
    assert json.loads(listed) == {"sample_id": "2.png", "reason": store["all"].failed[2]}
    np.testing.assert_array_equal(features(store, "all", [0, 1, 3, 4]), features(whole, "all", [0, 1, 3, 4]))
    (pictures / "2.png").write_bytes(content)
    assert extract(mended).samples_done == 5
    assert contents(config.store).keys() == contents(f"{config.store}-whole").keys()
    np.testing.assert_array_equal(
        features(extract(mended), "all", [0, 1, 2, 3, 4]), features(whole, "all", [0, 1, 2, 3, 4])
    )


def test_a_batch_without_one_usable_picture_is_passed_over(config: ExtractConfig, pictures: Path) -> None:
    cut(pictures / "2.png")
    cut(pictures / "3.png")
    store = extract(replace(config, dataset="images", data_root=str(pictures), splits=None, limit=None))
    assert store["all"].finished == (0, 1, 4)
    assert list(store["all"].failed) == [2, 3]


def test_pictures_of_another_folder_are_not_mixed_in(config: ExtractConfig, pictures: Path) -> None:
    folder = replace(config, dataset="images", data_root=str(pictures), splits=None, limit=None)
    extract(folder)
    before = contents(config.store)
    Image.new("RGB", (50, 40)).save(pictures / "0.png")
    with pytest.raises(DataError, match=r"'0\.png' is not the picture from which"):
        extract(folder)
    assert contents(config.store) == before


def test_values_that_are_not_finite_fail_their_sample_by_name(
    config: ExtractConfig, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    """One letter's text embedding is poisoned: only the sample whose prompt holds it is lost."""
    poisoned = tmp_path / "poisoned"
    shutil.copytree(tiny_flux_folder, poisoned)
    weights = poisoned / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    tokens = json.loads((poisoned / "tokenizer_2" / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["shared.weight"][[piece for piece, _ in tokens].index("q")] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"sample_id": f"scenes-val-{n:06d}", "prompt": "q" if n == 1 else "near"} for n in range(5)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    store = extract(replace(config, backbone=str(poisoned), prompts=str(prompts)))
    assert store["val"].finished == (0, 2, 3, 4)
    assert "at t=0.5 are not finite" in store["val"].failed[1]
    assert "sample scenes-val-000001 failed" in (store.path / "logs" / "extract.log").read_text()
    assert extract(replace(config, backbone=str(poisoned), prompts=str(prompts))).samples_failed == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"noise": NoiseConfig(seed=7)}, "noise.seed is 0 in the store, 7 was asked"),
        ({"prompts": "oracle"}, "prompts is empty in the store, oracle was asked"),
        ({"resolution": 32}, "resolution is 64 in the store, 32 was asked"),
        ({"guidance": 1.0}, "guidance is 3.5 in the store, 1.0 was asked"),
        ({"layers": ("single.3",)}, "layers is double.1, single.2 in the store, single.3 was asked"),
        ({"timesteps": (0.3,)}, "timesteps is 0.5, 0.1 in the store, 0.3 was asked"),
    ],
)
def test_a_store_of_something_else_is_refused_and_left_alone(
    config: ExtractConfig, change: dict[str, object], complaint: str
) -> None:
    extract(replace(config, limit=1))
    before = contents(config.store)
    with pytest.raises(StoreError, match=complaint.replace(".", r"\.")) as caught:
        extract(replace(config, limit=1, **change))
    assert f"--store {config.store}-2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert contents(config.store) == before


def test_weights_that_changed_are_another_identity(
    config: ExtractConfig, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_flux_folder, folder)
    moved = replace(config, backbone=str(folder), limit=1)
    extract(moved)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(StoreError, match="weights_sha256 is"):
        extract(moved)


def test_missing_weights_are_named_and_nothing_is_begun(
    config: ExtractConfig, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_flux_folder, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        extract(replace(config, backbone=str(folder)))
    assert not Path(str(config.store)).exists()


def test_too_little_disk_is_found_before_anything_is_begun(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 9_000, 1_000))
    with pytest.raises(StorageError, match="free; choose fewer --layers"):
        extract(config)
    assert not Path(str(config.store)).exists()
    assert extract(config, force=True).samples_done == 5


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files above 20 kB, as a full disk would refuse the next block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_in_the_middle_loses_nothing_that_was_done(
    config: ExtractConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def fill_the_disk(done: int, total: int, state: str) -> None:
        if done == 4:
            request.getfixturevalue("small_files")

    with pytest.raises(StorageError, match="File too large"):
        extract(config, fill_the_disk)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told: list[int] = []
    extract(config, lambda done, total, state: told.append(done))
    assert told[0] == 2
    undisturbed = replace(config, store=str(tmp_path / "undisturbed"))
    extract(undisturbed)
    assert contents(config.store) == contents(undisturbed.store)


def test_a_folder_of_other_things_is_left_alone(config: ExtractConfig) -> None:
    folder = Path(str(config.store))
    folder.mkdir()
    (folder / "thesis.tex").write_text("do not touch")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        extract(config)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_store_is_written_by_one_run_at_a_time(config: ExtractConfig) -> None:
    def second_run(done: int, total: int, state: str) -> None:
        with pytest.raises(StoreError, match="is being written by process"):
            extract(config)

    assert extract(config, second_run).samples_done == 5
