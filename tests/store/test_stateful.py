"""Anything may happen to a store, in any order: it is never believed wrongly, and repair makes it whole."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmdiff_cache.errors import DamageError, StoreError, StoreIncomplete
from mmdiff_cache.store.growth import restore_metadata
from mmdiff_cache.store.manifest import MANIFEST, Manifest, read_manifest
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.store.records import read_record, record_path
from mmdiff_cache.store.verify import verify
from mmdiff_cache.store.writer import open_writer
from tests.store.synthetic import (
    counted_files,
    ended_at_rename,
    make_features,
    make_manifest,
    make_schema,
    write_partition,
)

SCHEMA = make_schema(vocabularies=(), labels=(), layers=("single.4",), timesteps=(0.5,), partition_size=2)
LARGEST = 6
NAMES = tuple(f"s{n}" for n in range(LARGEST))
TRUTH = make_features(SCHEMA, list(NAMES)).hidden_states


def planned(samples: int) -> Manifest:
    return make_manifest(SCHEMA, splits={"train": NAMES[:samples]})


class StoreMachine(RuleBasedStateMachine):
    """Plan, run, kill, append, harm, verify and repair."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.root = self.home / "store"
        self.samples = 0
        self.harmed: dict[str, bytes | None] = {}

    @initialize(samples=st.integers(1, 3))
    def plan(self, samples: int) -> None:
        self.samples = samples
        open_writer(self.root, planned(samples)).close()

    @rule(partitions=st.integers(0, 3))
    def run(self, partitions: int) -> None:
        self.write(partitions, append=False)

    @rule(step=st.integers(0, 25), append=st.booleans())
    def killed_run(self, step: int, append: bool) -> None:
        if append:
            self.samples = min(self.samples + 1, LARGEST)
        with ended_at_rename(step):
            self.write(3, append=append)
        if append and self.root.exists():  # whether it was decided before the end shows in the files
            following = [name for name in ("manifest.next.json", MANIFEST) if (self.root / name).exists()]
            self.samples = len(read_manifest(self.root, following[0]).splits["train"])

    @rule(more=st.integers(1, 2))
    def append(self, more: int) -> None:
        before, self.samples = self.samples, min(self.samples + more, LARGEST)
        if not self.write(1, append=True):
            self.samples = before

    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "delete"]))
    def harm(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.vouched_for())), label="file")
        file = self.root / name
        if not file.exists():
            return
        content = bytearray(file.read_bytes())
        if how == "delete" or not content:
            file.unlink()
            self.harmed[name] = None
            return
        at = data.draw(st.integers(0, len(content) - 1), label="byte")
        if how == "flip":
            content[at] ^= 0x40
        else:
            del content[at:]
        file.write_bytes(content)
        self.harmed[name] = bytes(content)

    @rule()
    def verified(self) -> None:
        found, still = verify(self.root), self.still_harmed()
        assert found.sound == (not still), f"{found}\nharmed: {sorted(still)}"

    @rule()
    def repaired(self) -> None:
        restore_metadata(self.root)
        found = verify(self.root)
        with open_writer(self.root, planned(self.samples)) as writer:
            again = writer.pending("train")
            for partition in writer.manifest.partitions("train"):
                if partition in again or partition.name in found.partitions:
                    write_partition(writer, partition)
        self.harmed.clear()
        assert verify(self.root).sound
        whole = self.home / "whole"
        with open_writer(whole, planned(self.samples)) as writer:
            for partition in writer.pending("train"):
                write_partition(writer, partition)
        assert counted_files(self.root) == counted_files(whole)
        shutil.rmtree(whole)

    @invariant()
    @precondition(lambda self: self.samples > 0)
    def nothing_wrong_is_served(self) -> None:
        try:
            reader = open_store(self.root)["train"]
        except DamageError:
            assert any("zarr.json" in name or "/c." in name for name in self.still_harmed())
            return
        for n in range(len(reader)):
            try:
                values = reader.hidden_states([n])[0]
            except StoreIncomplete:
                assert reader.state(n) == "pending"
            except DamageError:
                assert self.still_harmed()
            else:
                assert reader.state(n) == "done"
                np.testing.assert_array_equal(values, TRUTH[n, 0])

    def teardown(self) -> None:
        if self.samples:
            self.repaired()
        shutil.rmtree(self.home)

    def write(self, partitions: int, *, append: bool) -> bool:
        """Go on with the plan, as far as so many partitions; whether the store could be opened."""
        try:
            with open_writer(self.root, planned(self.samples), append=append) as writer:
                for partition in writer.pending("train")[:partitions]:
                    write_partition(writer, partition)
        except StoreError:
            harmed = self.still_harmed()
            assert any(name.startswith("train.zarr") for name in harmed), "refused for no reason"
            return False
        return True

    def vouched_for(self) -> set[str]:
        """Files that manifest and records speak of, and the records themselves."""
        manifest = read_manifest(self.root)
        names = set(manifest.metadata)
        for partition in manifest.partitions("train"):
            ids = manifest.splits["train"][partition.start : partition.stop]
            try:
                record = read_record(self.root, partition, manifest.fingerprint, ids)
            except DamageError:
                names.add(record_path(partition))
                continue
            if record is not None:
                names |= {record_path(partition), *(entry.path for entry in record.files)}
        return names

    def still_harmed(self) -> set[str]:
        """The harmed files that nobody has written again and that something still vouches for.

        A record that is gone vouches for nothing: its partition is unfinished, which is no damage.
        """
        vouched = self.vouched_for()
        return {
            name
            for name, content in self.harmed.items()
            if name in vouched
            and content == ((self.root / name).read_bytes() if (self.root / name).exists() else None)
        }


def some(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class TestStore(StoreMachine.TestCase):
    settings = some(15, 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestStoreAtLength(StoreMachine.TestCase):
    settings = some(150, 25)
