"""Reads one split. What a record does not vouch for is an error with the sample's name, never a fill value.

Samples are addressed by position, layers by name (`single.4`), timesteps by value (0.26). All of it may be
called from several threads.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.records import LabelSpec

from .arrays import CROSS_ATTENTION, ArraySpec, arrays, discriminative_path
from .evidence import Evidence
from .manifest import Manifest
from .metadata import codec_words
from .quantise import restore
from .records import FileEntry, SampleEntry
from .schema import Discriminative, Variant
from .split_arrays import SplitArrays
from .threads import codec_pool

TIMESTEP_TOLERANCE = 1e-6


class SplitReader:
    """One split of a store."""

    def __init__(self, root: Path, manifest: Manifest, split: str) -> None:
        self.path, self.split = root / f"{split}.zarr", split
        self.ids: tuple[str, ...] = manifest.splits[split]
        self._manifest, self._schema = manifest, manifest.schema
        self._specs = {spec.path: spec for spec in arrays(manifest.schema, len(self.ids))}
        self._evidence = Evidence(root, manifest, split)
        self._arrays = SplitArrays(root, split, self._specs, self._evidence, self._schema.partition_size)

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
    def cross_attention_blocks(self) -> tuple[str, ...]:
        """Double blocks whose averaged cross-attention is stored."""
        return self._schema.cross_attention

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
        return codec_words(self._arrays.open(path))

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

    def variant_index(self, variant: int) -> int:
        """The variant itself. Raises ConfigError when there are not as many."""
        if not 0 <= variant < len(self.variants):
            raise ConfigError(
                f"variant {variant} is not in {self.path}; it has {len(self.variants)}, counted from 0"
            )
        return variant

    def read(self, sample: int, timestep: float, layer: str, variant: int = 0) -> NDArray[np.float16]:
        """One map, [h w C]. Touches one chunk."""
        return self.hidden_states([sample], [timestep], [layer], variant)[0, 0, 0]

    def hidden_states(
        self,
        samples: Sequence[int],
        timesteps: Sequence[float] | None = None,
        layers: Sequence[str] | None = None,
        variant: int | Sequence[int] = 0,
        out: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float16]:
        """Hidden states [B T L h w C] in the order asked for; None means all that are stored.

        `variant` is one for all, or one a sample. A map that is asked for twice is read once.
        `out`, when given, is filled and returned. Raises StoreIncomplete for a sample that was not finished
        or has failed, DamageError where the files do not match their record, ConfigError for a name that is
        not stored.
        """
        steps = self._steps(timesteps)
        blocks = range(len(self.layers)) if layers is None else [self.layer_index(layer) for layer in layers]
        self._evidence.require(samples)
        variants = self._variants(variant, samples)
        shape = (len(samples), len(steps), len(blocks), *self._schema.grid, self.channels)
        out = _target(out, shape, np.dtype(np.float16))
        rows = product(enumerate(zip(samples, variants, strict=True)), enumerate(steps), enumerate(blocks))
        places = {(row, i, j): (n, v, t, layer) for (row, (n, v)), (i, t), (j, layer) in rows}
        first = {stored: place for place, stored in reversed(places.items())}
        fresh = {place: stored for stored, place in first.items()}
        if self.lossy:
            self._restore(fresh, out)
        else:
            self._arrays.fill("hidden_states", [(stored, out[place]) for place, stored in fresh.items()])
        for place in places.keys() - fresh.keys():
            out[place] = out[first[places[place]]]
        return out

    def _restore(self, places: Mapping[tuple[int, ...], tuple[int, ...]], out: NDArray[np.float16]) -> None:
        """Fill `out` from whole numbers and scales; `places` has the stored position of every map in it."""
        steps = np.empty(out.shape, np.int8)
        scales = np.empty((*out.shape[:3], self.channels), np.float32)
        self._arrays.fill("hidden_states", [(stored, steps[place]) for place, stored in places.items()])
        self._arrays.fill(
            "hidden_states_scale", [(stored, scales[place]) for place, stored in places.items()]
        )
        for done in [codec_pool().submit(restore, steps[at], scales[at], out[at]) for at in places]:
            done.result()

    def concept_scores(
        self,
        vocabulary: str,
        samples: Sequence[int],
        timesteps: Sequence[float] | None = None,
        variant: int | Sequence[int] = 0,
    ) -> NDArray[np.float32]:
        """Raw products o_x . o_c, [B T block K h w] (Paper: Sec. 3.2)."""
        path = f"concepts/{self._vocabulary(vocabulary)}/scores"
        self._evidence.require(samples)
        return self._rows_of_steps(path, samples, timesteps, variant)

    def concept_maps(self, vocabulary: str, samples: Sequence[int], variant: int = 0) -> NDArray[np.float32]:
        """Shares of the concepts at every token, [B K h w]: mean over map_blocks and all stored timesteps."""
        path = f"concepts/{self._vocabulary(vocabulary)}/maps"
        return self._arrays.rows(path, samples, self.variant_index(variant))

    def cross_attention(
        self,
        samples: Sequence[int],
        timesteps: Sequence[float] | None = None,
        variant: int | Sequence[int] = 0,
    ) -> NDArray[np.float32]:
        """Attention of image to text of every stored block, [B T block h w] (Paper: Tab. 5).

        Raises ConfigError where none was kept.
        """
        if CROSS_ATTENTION not in self._specs:
            raise ConfigError(f"{self.path} has no cross-attention maps; extract with --cross-attention")
        self._evidence.require(samples)
        return self._rows_of_steps(CROSS_ATTENTION, samples, timesteps, variant)

    def _rows_of_steps(
        self,
        path: str,
        samples: Sequence[int],
        timesteps: Sequence[float] | None,
        variant: int | Sequence[int],
    ) -> NDArray[np.float32]:
        """Rows [B T ...] of an array whose chunk is one (sample, variant, timestep)."""
        steps, variants = self._steps(timesteps), self._variants(variant, samples)
        out = np.empty((len(samples), len(steps), *self._specs[path].shape[3:]), np.float32)
        pairs = product(enumerate(zip(samples, variants, strict=True)), enumerate(steps))
        self._arrays.fill(path, [((n, v, t), out[row, i]) for (row, (n, v)), (i, t) in pairs])
        return out

    def discriminative_features(
        self, name: str, samples: Sequence[int], variant: int | Sequence[int] = 0
    ) -> NDArray[np.float16]:
        """Patch tokens of all stored blocks of an encoder, [B L h w D] (Paper: Sec. 3.3)."""
        if name not in self.discriminative:
            stored = ", ".join(self.discriminative) or "none"
            raise ConfigError(f"discriminative features {name!r} are not in {self.path}; stored: {stored}")
        self._evidence.require(samples)
        path, variants = discriminative_path(name), self._variants(variant, samples)
        out = np.empty((len(samples), *self._specs[path].shape[2:]), np.float16)
        places = product(enumerate(zip(samples, variants, strict=True)), range(out.shape[1]))
        self._arrays.fill(path, [((n, v, layer), out[row, layer]) for (row, (n, v)), layer in places])
        return out

    def latents(self, samples: Sequence[int]) -> NDArray[np.float32]:
        """Clean latents as tokens, [B h w P]."""
        return self._arrays.rows("latents", samples)

    def images(self, samples: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures at network size, [B H W 3]."""
        return self._arrays.rows("images", samples)

    def prompts(self, samples: Sequence[int]) -> list[str]:
        """The texts that conditioned the backbone."""
        return [str(text) for text in self._arrays.rows("prompt", samples)]

    def generation_seeds(self, samples: Sequence[int]) -> NDArray[np.int64]:
        """Seeds of the noise that pictures were drawn from, [B]. Raises ConfigError where none was drawn."""
        return self._arrays.rows(self._drawn("generation_seed"), samples)

    def sigmas(self, samples: Sequence[int]) -> NDArray[np.float32]:
        """The noise level at which each timestep was captured, [B T]: t itself, but in mode `nearest`."""
        return self._arrays.rows(self._drawn("sigma"), samples)

    def stored_ids(self, samples: Sequence[int]) -> list[str]:
        """The ids as the store's own array has them; `ids` are those of the manifest."""
        return [str(name) for name in self._arrays.rows("sample_id", samples)]

    def noise_keys(self, samples: Sequence[int]) -> NDArray[np.uint64]:
        """Philox keys, [B V 2]; records.draw_noise gives the noise itself."""
        return self._arrays.rows("noise_key", samples)

    def labels(self, name: str, samples: Sequence[int]) -> NDArray[Any]:
        """Label maps at network size, [B H W]: uint8 ids, or float32 metres."""
        self._evidence.require(samples, self._label(name))
        return self._arrays.rows(f"labels/{name}/map", samples)

    def original_label(self, name: str, sample: int) -> NDArray[Any]:
        """One label map as it was distributed, [H0 W0]."""
        self._evidence.require([sample], self._label(name))
        folder = f"labels/{name}"
        rows, columns = (int(side) for side in self._arrays.rows(f"{folder}/original_size", [sample])[0])
        return np.ascontiguousarray(self._arrays.rows(f"{folder}/original", [sample])[0, :rows, :columns])

    def audit(self, samples: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Statistics of every map, [B V T L statistic] (see STATISTICS); by default of all finished ones."""
        return self._arrays.rows("audit", self.finished if samples is None else samples)

    def _steps(self, timesteps: Sequence[float] | None) -> Sequence[int]:
        return (
            range(len(self.timesteps)) if timesteps is None else [self.timestep_index(t) for t in timesteps]
        )

    def _variants(self, variant: int | Sequence[int], samples: Sequence[int]) -> list[int]:
        """The variant of each sample."""
        each = [variant] * len(samples) if isinstance(variant, int) else list(variant)
        return [self.variant_index(one) for one in each]

    def _vocabulary(self, name: str) -> str:
        if name not in self.vocabularies:
            stored = ", ".join(self.vocabularies) or "none"
            raise ConfigError(f"concept vocabulary {name!r} is not in {self.path}; stored: {stored}")
        return name

    def _drawn(self, path: str) -> str:
        if not self.drawn:
            raise ConfigError(f"{self.path} has no {path}: its pictures were not drawn from prompts")
        return path

    def _label(self, name: str) -> str:
        if name not in self.label_specs:
            stored = ", ".join(self.label_specs) or "none"
            raise ConfigError(f"label set {name!r} is not in {self.path}; stored: {stored}")
        return name


def _target(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> NDArray[Any]:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype:
        raise ConfigError(f"out must be {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if not out.flags.writeable:  # Blosc writes without asking
        raise ConfigError("out must be an array that can be written, got one that is read-only")
    return out
