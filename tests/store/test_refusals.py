"""What a writer refuses: other identities, contents and data, foreign folders, versions, a second writer."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mmdiff_cache.errors import ConfigError, StorageError, StoreError
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.store.manifest import Manifest, compare, free_name
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.records import seal
from mmdiff_cache.store.schema import LabelArray, StoreSchema, Variant, Vocabulary
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import (
    IDENTITY,
    counted_files,
    make_manifest,
    make_schema,
    write_partition,
    write_store,
)

SCHEMA = make_schema()
FULL = SCHEMA.vocabularies[0]


def with_identity(**changes: object) -> Manifest:
    return make_manifest(identity={**IDENTITY, **changes})


def with_schema(**changes: object) -> Manifest:
    return make_manifest(dataclasses.replace(SCHEMA, **changes))  # type: ignore[arg-type]


ASKED_FOR_MORE: dict[str, tuple[Manifest, str]] = {
    "another dtype": (
        with_identity(dtype="bfloat16"),
        "identity dtype is float32 in the store, bfloat16 was asked",
    ),
    "other weights": (
        with_identity(backbone={"name": "flux-tiny", "weights": "1" * 64}),
        r"identity backbone\.weights is 000",
    ),
    "another seed": (with_identity(noise={"form": "flow", "seed": 8, "shared": True}), r"noise\.seed is 7"),
    "a new field": (with_identity(guidance=3.5), r"guidance is None in the store, 3\.5 was asked"),
    "one layer more": (with_schema(layers=(*SCHEMA.layers, "single.5")), "contents layers is"),
    "another timestep": (with_schema(timesteps=(0.9, 0.27)), r"contents timesteps is 0\.9, 0\.26, 0\.001"),
    "another variant": (with_schema(variants=(Variant(noise_draw=5),)), "contents variants"),
    "more channels": (with_schema(channels=9), "contents channels is 8 in the store, 9 was asked"),
    "another image size": (with_schema(image_size=(16, 16)), "contents image_size"),
    "other concepts": (
        with_schema(vocabularies=(Vocabulary(name="scenes", concepts=("sky",), blocks=FULL.blocks),)),
        r"contents concepts\.scenes",
    ),
    "another block": (
        with_schema(vocabularies=(dataclasses.replace(FULL, blocks=(*FULL.blocks, "double.2")),)),
        r"concepts\.scenes\.blocks",
    ),
    "another reading of maps": (
        with_schema(vocabularies=(dataclasses.replace(FULL, map_blocks=("double.0",)),)),
        r"concepts\.scenes\.map_blocks is double\.1",
    ),
    "a new vocabulary": (
        with_schema(vocabularies=(Vocabulary(name="new", concepts=("a", "b"), blocks=("double.0",)),)),
        r"concepts\.new is absent",
    ),
    "another ignore id": (
        with_schema(
            labels=(LabelArray(spec=LabelSpec(name="salient", kind="mask", ignore=9), canvas=(1, 1)),)
        ),
        r"labels\.salient",
    ),
    "more samples": (
        make_manifest(train=7),
        "fewer samples: samples of train is 6 in the store, 7 was asked; add the new ones with --append",
    ),
    "other samples": (
        make_manifest(splits={"train": ("train/000", "x")}),
        "data sample 1 of train is train/001 in the store, x was asked",
    ),
    "another split": (
        make_manifest(splits={"val": ("a",)}),
        "data splits is test, train in the store, val was asked",
    ),
}

CONTAINED: dict[str, Manifest] = {
    "the same": make_manifest(),
    "fewer layers": with_schema(layers=("single.4",)),
    "layers in another order": with_schema(layers=SCHEMA.layers[::-1]),
    "fewer timesteps": with_schema(timesteps=(0.26,)),
    "one variant": with_schema(variants=(Variant(),)),
    "one vocabulary": with_schema(vocabularies=(FULL,)),
    "no labels": with_schema(labels=()),
    "the first samples": make_manifest(train=3, test=1),
    "one split": make_manifest(splits={"train": make_manifest().splits["train"]}),
    "another partition size": with_schema(partition_size=2),
    "another codec": with_schema(codec="fast"),
}


@pytest.mark.parametrize(("asked", "words"), ASKED_FOR_MORE.values(), ids=ASKED_FOR_MORE.keys())
def test_what_is_not_there_is_refused_by_field(finished: Path, asked: Manifest, words: str) -> None:
    before = counted_files(finished)
    with pytest.raises(StoreError, match=words) as refusal:
        open_writer(finished, asked)
    assert f"--store {finished}-2" in str(refusal.value)
    assert counted_files(finished) == before


@pytest.mark.parametrize("asked", CONTAINED.values(), ids=CONTAINED.keys())
def test_what_is_there_already_is_nothing_to_do(finished: Path, asked: Manifest) -> None:
    with open_writer(finished, asked) as writer:
        assert [writer.pending(split) for split in asked.splits] == [[]] * len(asked.splits)


def test_an_unfinished_store_is_finished_only_by_its_own_plan(tmp_path: Path) -> None:
    """Rows of another layer order have the same shape: they must never get in."""
    path, whole = tmp_path / "s", make_manifest()
    smaller = ("fewer layers", "layers in another order", "another codec", "the first samples")
    with open_writer(path, whole) as writer:
        write_partition(writer, writer.pending("test")[0])
    for name in smaller:
        with pytest.raises(StoreError, match=r"is not finished \(train-000000 is the first of"):
            open_writer(path, CONTAINED[name])
    write_store(path, whole)
    for name in smaller:
        open_writer(path, CONTAINED[name]).close()


def test_one_split_of_an_unfinished_store_may_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    open_writer(path, make_manifest()).close()
    write_store(path, CONTAINED["one split"])
    store = open_store(path)
    assert (store["train"].finished, store["test"].finished) == (tuple(range(6)), ())


def test_other_provenance_only_warns(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_writer(finished, make_manifest(provenance={"zarr": "4", "batch_size": 2})).close()
    assert "zarr is 3 in the store, 4 was asked" in caplog.text


def test_compare_reports_every_difference() -> None:
    asked = with_schema(channels=9, layers=("x",))
    fields = [difference.field for difference in compare(make_manifest(), asked)]
    assert fields == ["layers", "channels"]


def test_foreign_folders_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is no store and not empty \(it has 'notes.txt'\)"):
        open_writer(tmp_path, make_manifest())
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(StoreError, match="is a file"):
        open_writer(tmp_path / "notes.txt", make_manifest())
    with pytest.raises(StorageError, match="cannot write"):
        open_writer(tmp_path / "notes.txt" / "below", make_manifest())


def test_foreign_files_in_staging_are_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (path / "staging" / "my thesis").mkdir(parents=True)
    (path / "staging" / "train-000000-123-0123abcd").mkdir()
    open_writer(path, make_manifest()).close()
    assert [entry.name for entry in (path / "staging").iterdir()] == ["my thesis"]


def test_data_without_a_manifest_is_never_overwritten(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "s"))
    (path / "manifest.json").unlink()
    before = counted_files_without_manifest(path)
    with pytest.raises(StoreError, match=r"has data but no manifest\.json"):
        open_writer(path, make_manifest())
    assert counted_files_without_manifest(path) == before


def counted_files_without_manifest(path: Path) -> dict[str, bytes]:
    return {p.as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


def test_other_format_versions_are_named(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "s"))
    body = json.loads((path / "manifest.json").read_bytes())
    body["format_version"] = 2
    (path / "manifest.json").write_bytes(json.dumps(body).encode())
    with pytest.raises(StoreError, match="format version 2, this mmdiff-cache reads version 1"):
        open_store(path)
    del body["format_version"]
    (path / "manifest.json").write_bytes(json.dumps(body).encode())
    with pytest.raises(StoreError, match="was not written by mmdiff-cache"):
        open_writer(path, make_manifest())


def test_a_sealed_document_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(seal({"hello": 1}))
    with pytest.raises(StoreError, match="is not the manifest of a store"):
        open_store(tmp_path)


def test_a_second_writer_is_told_who_holds_the_store(tmp_path: Path) -> None:
    path, manifest = tmp_path / "s", make_manifest()
    with open_writer(path, manifest):
        with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on .*, since 2"):
            open_writer(path, manifest)
        script = "import sys; from tests.store.synthetic import *; open_writer(sys.argv[1], make_manifest())"
        words = [sys.executable, "-c", script, str(path)]
        other = subprocess.run(
            words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
        )
        assert f"is being written by process {os.getpid()}" in other.stderr
    open_writer(path, manifest).close()


def test_a_refused_writer_leaves_no_lock(finished: Path) -> None:
    with pytest.raises(StoreError):
        open_writer(finished, with_identity(dtype="bfloat16"))
    open_writer(finished, make_manifest()).close()


@pytest.mark.parametrize("reached", [True, False])
def test_a_folder_that_cannot_be_written_is_said_so(reached: bool) -> None:
    """In a process without rights of its own, for root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:  # those of pytest lie in folders that only their user reaches
        (folder := Path(name) / "folder").mkdir()
        Path(name).chmod(0o755 if reached else 0o700)
        _refused_without_rights(folder)


def _refused_without_rights(folder: Path) -> None:
    script = (
        "import sys, os\nfrom tests.store.synthetic import *\n"
        "os.setuid(65534) if os.getuid() == 0 else os.chmod(sys.argv[1], 0o500)\n"
        "try:\n    open_writer(sys.argv[1] + '/s', make_manifest())\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    words = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("StorageRefused cannot write"), done.stdout + done.stderr
    assert "no permission; choose a folder that can be written, with --store" in done.stdout


def test_a_full_disk_is_said_so_and_nothing_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = tmp_path / "s", make_manifest()
    with open_writer(path, manifest) as writer:
        partition = writer.pending("train")[0]

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match=r"no space left .* free some space"):
                write_partition(writer, partition)
        assert not list((path / "staging").iterdir())
        assert partition in writer.pending("train")
    write_store(path, manifest)
    assert open_store(path).samples_done == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"identity": {}}, r"noise\.seed"),
        ({"splits": {}}, "at least one split"),
        ({"splits": {"train": ()}}, "no samples"),
        ({"splits": {"../x": ("a",)}}, r"\.\./x"),
        ({"splits": {"train": ("a", "b", "a")}}, "'a' twice"),
        ({"splits": {"train": ("",)}}, "non-empty UTF-8"),
        ({"splits": {"train": ("a\udcff",)}}, "non-empty UTF-8"),
        ({"splits": {"train": ("a\0b",)}}, "without NUL"),
    ],
)
def test_impossible_manifests_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_manifest(**changes)


def test_a_free_name_is_free(tmp_path: Path) -> None:
    for name in ("s", "s-2", "s-3"):
        (tmp_path / name).mkdir()
    assert free_name(tmp_path / "s") == tmp_path / "s-4"


def test_only_planned_partitions_can_be_begun(tmp_path: Path) -> None:
    with open_writer(tmp_path / "s", make_manifest()) as writer:
        other = dataclasses.replace(writer.pending("train")[0], stop=3)
        with pytest.raises(ConfigError, match="is not a partition"):
            writer.begin(other)
        with pytest.raises(ConfigError, match="'val' was not planned"):
            writer.pending("val")


def test_schema_fixture_is_the_stored_one(finished: Path) -> None:
    assert isinstance(SCHEMA, StoreSchema)
    assert open_store(finished).manifest.schema == SCHEMA
