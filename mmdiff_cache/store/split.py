"""Reads one split. What a record does not vouch for is an error with the sample's name, never a fill value.

Samples are addressed by position, layers by name (`single.4`), timesteps by value (0.26). Chunks are read
straight out of their shards (`chunks`); zarr reads what is one chunk a partition, and arrays whose metadata
says something that `shards` does not know. All of it may be called from several threads.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mmdiff_cache.errors import ConfigError, DamageError, MMDiffError, StorageError
from mmdiff_cache.records import LabelSpec

from .arrays import ArraySpec, arrays, discriminative_path
from .chunks import ChunkReader
from .evidence import Evidence
from .manifest import Manifest
from .metadata import chunk_key, codec_words
from .quantise import restore
from .records import FileEntry, SampleEntry
from .schema import Discriminative, Variant
from .shards import ShardLayout, parse_layout
from .threads import codec_pool

TIMESTEP_TOLERANCE = 1e-6


class SplitReader:
    """One split of a store."""

    def __init__(self, root: Path, manifest: Manifest, split: str) -> None:
        self.path, self.split = root / f"{split}.zarr", split
        self.ids: tuple[str, ...] = manifest.splits[split]
        self._root, self._manifest, self._schema = root, manifest, manifest.schema
        self._specs = {spec.path: spec for spec in arrays(manifest.schema, len(self.ids))}
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._layouts: dict[str, ShardLayout | None] = {}
        self._evidence = Evidence(root, manifest, split)
        self._chunks = ChunkReader(root, self._evidence)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The stored t, in order; 1 = pure noise."""
        return self._schema.timesteps

    @property
    def layers(self) -> tuple[str, ...]:
        """Addresses of the stored blocks, in order."""
        return self._schema.layers

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Noise draw and mirroring of every variant."""
        return self._schema.variants

    @property
    def seed(self) -> int:
        """Seed of the run's noise."""
        return self._manifest.seed

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows h and columns w."""
        return self._schema.grid

    @property
    def channels(self) -> int:
        """C of the hidden states."""
        return self._schema.channels

    @property
    def lossy(self) -> bool:
        """Whether hidden states were rounded to int8."""
        return self._schema.codec == "int8"

    @property
    def drawn(self) -> bool:
        """Whether the pictures were drawn from their prompts."""
        return self._schema.drawn

    @property
    def label_specs(self) -> dict[str, LabelSpec]:
        """What the values of each label set mean, by name."""
        return {label.spec.name: label.spec for label in self._schema.labels}

    @property
    def added_labels(self) -> tuple[str, ...]:
        """Names of the label sets that came after the extraction: a sample may lack them (`state`)."""
        return tuple(label.spec.name for label in self._schema.labels if label.added)

    @property
    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """The stored concept lists, by name."""
        return {vocabulary.name: vocabulary.concepts for vocabulary in self._schema.vocabularies}

    @property
    def discriminative(self) -> dict[str, Discriminative]:
        """The stored features of discriminative encoders, by name."""
        return {encoder.name: encoder for encoder in self._schema.discriminative}

    @property
    def finished(self) -> tuple[int, ...]:
        """Positions of the samples that can be read."""
        return tuple(
            n for n, entry in enumerate(self._evidence.samples) if entry is not None and entry.state == "done"
        )

    @property
    def failed(self) -> dict[int, str]:
        """Positions of the samples that failed, with the reason."""
        return {
            n: e.reason or ""
            for n, e in enumerate(self._evidence.samples)
            if e is not None and e.state == "failed"
        }

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every recorded file of the split."""
        return tuple(self._evidence.files.values())

    @property
    def array_specs(self) -> tuple[ArraySpec, ...]:
        """Every array of the split, coordinates too."""
        return tuple(self._specs.values())

    def codec(self, path: str) -> str:
        """The codecs of an array in words, such as `blosc zstd 1 shuffle, crc32c`."""
        return codec_words(self._array(path))

    def state(self, sample: int, label_set: str | None = None) -> str:
        """`done`, `failed`, `pending` (never finished) or `damaged` (its record cannot be used).

        With a label set, that of the sample's label: one that was added later may lack some.
        """
        return self._evidence.state(sample, label_set)

    def label_entries(self, label_set: str) -> tuple[SampleEntry, ...]:
        """What the records say of a label set that was added later, sample by sample."""
        entries = self._evidence.entries(self._label(label_set))
        return tuple(entry for entry in entries if entry is not None)

    def content_hash(self, sample: int) -> str:
        """SHA-256 of the source picture and labels from which the sample was made."""
        self._evidence.require([sample])
        entry = self._evidence.samples[sample]
        return (entry.content_hash if entry is not None else None) or ""

    def timestep_index(self, timestep: float) -> int:
        """Position of a stored t. Raises ConfigError, with the list, when none is within 1e-6."""
        gaps = [abs(stored - timestep) for stored in self.timesteps]
        if not min(gaps) <= TIMESTEP_TOLERANCE:
            stored = ", ".join(f"{t:g}" for t in self.timesteps)
            raise ConfigError(f"timestep {timestep:g} is not in {self.path}; stored: {stored}")
        return gaps.index(min(gaps))

    def layer_index(self, layer: str) -> int:
        """Position of a stored layer. Raises ConfigError, with the list, when it is not stored."""
        if layer not in self.layers:
            raise ConfigError(f"layer {layer!r} is not in {self.path}; stored: {', '.join(self.layers)}")
        return self.layers.index(layer)

    def read(self, sample: int, timestep: float, layer: str, variant: int = 0) -> NDArray[np.float16]:
        """One map, [h w C]. Touches one chunk."""
        return self.hidden_states([sample], [timestep], [layer], variant)[0, 0, 0]

    def hidden_states(
        self,
        samples: Sequence[int],
        timesteps: Sequence[float] | None = None,
        layers: Sequence[str] | None = None,
        variant: int = 0,
        out: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float16]:
        """Hidden states [B T L h w C] in the order asked for; None means all that are stored.

        `out`, when given, is filled and returned. Raises StoreIncomplete for a sample that was not finished
        or has failed, DamageError where the files do not match their record, ConfigError for a name that is
        not stored.
        """
        steps = self._steps(timesteps)
        blocks = range(len(self.layers)) if layers is None else [self.layer_index(layer) for layer in layers]
        self._evidence.require(samples)
        variant = self._variant(variant)
        shape = (len(samples), len(steps), len(blocks), *self._schema.grid, self.channels)
        out = _target(out, shape, np.dtype(np.float16))
        rows = product(enumerate(samples), enumerate(steps), enumerate(blocks))
        places = {(row, i, j): (n, variant, t, layer) for (row, n), (i, t), (j, layer) in rows}
        if self.lossy:
            self._restore(places, out)
        else:
            self._fill("hidden_states", [(stored, out[place]) for place, stored in places.items()])
        return out

    def _restore(self, places: Mapping[tuple[int, ...], tuple[int, ...]], out: NDArray[np.float16]) -> None:
        """Fill `out` from whole numbers and scales; `places` has the stored position of every map in it."""
        steps = np.empty(out.shape, np.int8)
        scales = np.empty((*out.shape[:3], self.channels), np.float32)
        self._fill("hidden_states", [(stored, steps[place]) for place, stored in places.items()])
        self._fill("hidden_states_scale", [(stored, scales[place]) for place, stored in places.items()])
        for done in [codec_pool().submit(restore, steps[at], scales[at], out[at]) for at in places]:
            done.result()

    def concept_scores(
        self,
        vocabulary: str,
        samples: Sequence[int],
        timesteps: Sequence[float] | None = None,
        variant: int = 0,
    ) -> NDArray[np.float32]:
        """Raw products o_x . o_c, [B T block K h w] (Paper: Sec. 3.2)."""
        path = f"concepts/{self._vocabulary(vocabulary)}/scores"
        self._evidence.require(samples)
        steps, variant = self._steps(timesteps), self._variant(variant)
        out = np.empty((len(samples), len(steps), *self._specs[path].shape[3:]), np.float32)
        pairs = product(enumerate(samples), enumerate(steps))
        self._fill(path, [((n, variant, t), out[row, i]) for (row, n), (i, t) in pairs])
        return out

    def concept_maps(self, vocabulary: str, samples: Sequence[int], variant: int = 0) -> NDArray[np.float32]:
        """Shares of the concepts at every token, [B K h w]: mean over map_blocks and all stored timesteps."""
        path = f"concepts/{self._vocabulary(vocabulary)}/maps"
        return self._rows(path, samples, self._variant(variant))

    def discriminative_features(
        self, name: str, samples: Sequence[int], variant: int = 0
    ) -> NDArray[np.float16]:
        """Patch tokens of all stored blocks of an encoder, [B L h w D] (Paper: Sec. 3.3)."""
        if name not in self.discriminative:
            stored = ", ".join(self.discriminative) or "none"
            raise ConfigError(f"discriminative features {name!r} are not in {self.path}; stored: {stored}")
        self._evidence.require(samples)
        path, variant = discriminative_path(name), self._variant(variant)
        out = np.empty((len(samples), *self._specs[path].shape[2:]), np.float16)
        places = product(enumerate(samples), range(out.shape[1]))
        self._fill(path, [((n, variant, layer), out[row, layer]) for (row, n), layer in places])
        return out

    def latents(self, samples: Sequence[int]) -> NDArray[np.float32]:
        """Clean latents as tokens, [B h w P]."""
        return self._rows("latents", samples)

    def images(self, samples: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures at network size, [B H W 3]."""
        return self._rows("images", samples)

    def prompts(self, samples: Sequence[int]) -> list[str]:
        """The texts that conditioned the backbone."""
        return [str(text) for text in self._rows("prompt", samples)]

    def generation_seeds(self, samples: Sequence[int]) -> NDArray[np.int64]:
        """Seeds of the noise that pictures were drawn from, [B]. Raises ConfigError where none was drawn."""
        return self._rows(self._of_drawing("generation_seed"), samples)

    def sigmas(self, samples: Sequence[int]) -> NDArray[np.float32]:
        """The noise level at which each stored timestep was captured, [B T]: t itself, but in mode `nearest`.

        Raises ConfigError where no picture was drawn.
        """
        return self._rows(self._of_drawing("sigma"), samples)

    def stored_ids(self, samples: Sequence[int]) -> list[str]:
        """The ids as the store's own array has them; `ids` are those of the manifest."""
        return [str(name) for name in self._rows("sample_id", samples)]

    def noise_keys(self, samples: Sequence[int]) -> NDArray[np.uint64]:
        """Philox keys, [B V 2]; records.draw_noise gives the noise itself."""
        return self._rows("noise_key", samples)

    def labels(self, name: str, samples: Sequence[int]) -> NDArray[Any]:
        """Label maps at network size, [B H W]: uint8 ids, or float32 metres."""
        self._evidence.require(samples, self._label(name))
        return self._rows(f"labels/{name}/map", samples)

    def original_label(self, name: str, sample: int) -> NDArray[Any]:
        """One label map as it was distributed, [H0 W0]."""
        self._evidence.require([sample], self._label(name))
        folder = f"labels/{name}"
        rows, columns = (int(side) for side in self._rows(f"{folder}/original_size", [sample])[0])
        return np.ascontiguousarray(self._rows(f"{folder}/original", [sample])[0, :rows, :columns])

    def audit(self, samples: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Statistics of every map, [B V T L statistic] (see STATISTICS); by default of all finished ones."""
        return self._rows("audit", self.finished if samples is None else samples)

    def _steps(self, timesteps: Sequence[float] | None) -> Sequence[int]:
        return (
            range(len(self.timesteps)) if timesteps is None else [self.timestep_index(t) for t in timesteps]
        )

    def _variant(self, variant: int) -> int:
        if not 0 <= variant < len(self.variants):
            raise ConfigError(
                f"variant {variant} is not in {self.path}; it has {len(self.variants)}, counted from 0"
            )
        return variant

    def _vocabulary(self, name: str) -> str:
        if name not in self.vocabularies:
            stored = ", ".join(self.vocabularies) or "none"
            raise ConfigError(f"concept vocabulary {name!r} is not in {self.path}; stored: {stored}")
        return name

    def _label(self, name: str) -> str:
        if name not in self.label_specs:
            stored = ", ".join(self.label_specs) or "none"
            raise ConfigError(f"label set {name!r} is not in {self.path}; stored: {stored}")
        return name

    def _of_drawing(self, path: str) -> str:
        if not self._schema.drawn:
            raise ConfigError(f"{self.path} has no {path}: its pictures were not drawn from prompts")
        return path

    def _rows(self, path: str, samples: Sequence[int], variant: int | None = None) -> NDArray[Any]:
        """Rows of a small array."""
        self._evidence.require(samples)
        spec = self._specs[path]
        inner = spec.shape[1:] if variant is None else spec.shape[2:]
        out = np.empty((len(samples), *inner), object if spec.dtype == "string" else spec.dtype)
        if spec.chunk[0] == 1 and spec.dtype != "string":
            behind = () if variant is None else (variant,)
            self._fill(path, [((n, *behind), out[row]) for row, n in enumerate(samples)])
            return out
        for run, target in _runs(samples, self._schema.partition_size):
            with self._reading(path, (run.start // self._schema.partition_size,)) as array:
                out[target] = array.get_basic_selection(run if variant is None else (run, variant))
        return out

    def _fill(self, path: str, wanted: Sequence[tuple[tuple[int, ...], NDArray[Any]]]) -> None:
        """Fill each target with the chunk at its position; a position names all axes that chunks divide."""
        layout, spec = self._layout(path), self._specs[path]
        shard = spec.shard or spec.chunk
        if layout is None:
            for position, target in wanted:
                outer = tuple(at // size for at, size in zip(position, shard, strict=False))
                with self._reading(path, outer) as array:
                    target[...] = array.get_basic_selection(position)
            return
        files: dict[str, list[tuple[int, NDArray[Any]]]] = {}
        for position, target in wanted:
            outer, number = layout.locate((*position, *[0] * (len(spec.shape) - len(position))))
            files.setdefault(f"{self.split}.zarr/{chunk_key(spec, *outer)}", []).append((number, target))
        self._chunks.read(layout, list(files.items()))

    def _layout(self, path: str) -> ShardLayout | None:
        """How an array's shards can be read without zarr; None where its metadata says something unknown."""
        if path not in self._layouts:
            spec = self._specs[path]
            found = parse_layout(self._metadata(path))
            fits = found is not None and (found.shard, found.chunk, found.dtype) == (
                spec.shard,
                spec.chunk,
                np.dtype(spec.dtype),
            )
            self._layouts[path] = found if fits else None
        return self._layouts[path]

    def _metadata(self, path: str) -> bytes:
        file = self.path / path / "zarr.json"
        try:
            return file.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror or error}") from error

    @contextmanager
    def _reading(self, path: str, position: tuple[int, ...]) -> Generator["zarr.Array[Any]"]:
        """Give the array after a look at the shard's size; any trouble inside it is damage of that file."""
        name = f"{self.split}.zarr/{chunk_key(self._specs[path], *position)}"
        file = self._root / name
        try:
            self._evidence.check_file(name)
            yield self._array(path)
        except MMDiffError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise DamageError(
                f"{file} is damaged ({error}); the rest of the store can still be read"
            ) from error

    def _array(self, path: str) -> "zarr.Array[Any]":
        """Opened once; two threads that meet here open it twice, which is harmless."""
        if path not in self._arrays:
            self._arrays[path] = zarr.open_array(self.path / path, mode="r", zarr_format=3)
        return self._arrays[path]


def _target(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        raise ConfigError(f"out must be {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if not out.flags.writeable:  # Blosc writes without asking
        raise ConfigError("out must be an array that can be written, got one that is read-only")
    return out


def _runs(positions: Sequence[int], size: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Runs of consecutive positions as (slice to read, slice to fill); none crosses a multiple of `size`."""
    begin = 0
    for end in range(1, len(positions) + 1):
        last = end == len(positions)
        if (
            last
            or positions[end] != positions[end - 1] + 1
            or (size is not None and positions[end] % size == 0)
        ):
            yield slice(positions[begin], positions[end - 1] + 1), slice(begin, end)
            begin = end
