"""The files that describe a split: every zarr.json, and the coordinates. A pure function of schema and sample
count.

They are made in memory and written once, with the manifest, which keeps their hashes; nothing rewrites them
later.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from mmdiff_cache.config import Codec
from mmdiff_cache.errors import DamageError, StoreError

from .arrays import ArraySpec, arrays
from .manifest import NEXT_MANIFEST, Manifest, read_manifest
from .schema import FORMAT_VERSION

BLOSC_BLOCK = 262144
"""Bytes. zstd makes one Huffman table per 128 KiB: in blocks of 256 KiB both byte planes get their own."""

NOISE_FORMULAS = {
    "flow": "x_t = (1 - t) x_0 + t eps",
    "vp": "x_t = sqrt(1 - t) x_0 + sqrt(t) eps",
}


def split_files(manifest: Manifest, split: str) -> dict[str, bytes]:
    """Content of every metadata and coordinate file of a split, by path from the store's folder."""
    content: dict[str, Buffer] = {}
    memory = MemoryStore(store_dict=content)
    zarr.create_group(memory, attributes=_group_attributes(manifest, split))
    for spec in arrays(manifest.schema, len(manifest.splits[split])):
        _create_parents(memory, spec)
        _create_array(memory, spec, manifest.schema.codec)
    return {f"{split}.zarr/{key}": value.to_bytes() for key, value in sorted(content.items())}


def _group_attributes(manifest: Manifest, split: str) -> dict[str, Any]:
    noise: Mapping[str, Any] = manifest.identity["noise"]
    return {
        "title": f"features of a frozen diffusion transformer, split {split}",
        "format": "mmdiff-cache",
        "format_version": FORMAT_VERSION,
        "identity": manifest.fingerprint,
        "noise": {**noise, "x_t": NOISE_FORMULAS.get(noise.get("form", ""), "see the manifest")},
    }


def _create_parents(memory: MemoryStore, spec: ArraySpec) -> None:
    """Make the groups above an array, where they are not there yet; parents first."""
    parts = spec.path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        zarr.open_group(memory, path="/".join(parts[:depth]), mode="a")


def _create_array(memory: MemoryStore, spec: ArraySpec, codec: Codec) -> None:
    array = zarr.create_array(
        memory,
        name=spec.path,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunk,
        shards=spec.shard,
        compressors=_compressors(spec, codec),
        fill_value=spec.fill,
        attributes=dict(spec.attributes),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=spec.dims,
        config={"write_empty_chunks": True},
    )
    if spec.values is not None:
        array[:] = np.array(spec.values, dtype=object if spec.dtype == "string" else spec.dtype)


def _compressors(spec: ArraySpec, codec: Codec) -> list[BytesBytesCodec]:
    """Blosc and a checksum for data; text and coordinates are too small to compress."""
    if spec.dtype == "string" or spec.reach == "array":
        return [Crc32cCodec()]
    size = spec.itemsize
    if codec == "fast":
        blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=size, blocksize=BLOSC_BLOCK)
    else:
        blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=size, blocksize=BLOSC_BLOCK)
    return [blosc, Crc32cCodec()]


def codec_words(array: "zarr.Array[Any]") -> str:
    """How the values of an array are encoded, in words."""
    words: list[str] = []
    for codec in array.compressors:
        if isinstance(codec, BloscCodec):
            words.append(f"blosc {codec.cname.value} {codec.clevel} {codec.shuffle.value}")
        else:
            words.append("crc32c" if isinstance(codec, Crc32cCodec) else str(codec))
    return ", ".join(words)


def chunk_key(spec: ArraySpec, *position: int) -> str:
    """File of a shard, below its split's group; `position` counts shards along the leading axes."""
    numbers = [*position, *[0] * (len(spec.shape) - len(position))]
    return f"{spec.path}/c.{'.'.join(map(str, numbers))}"


def check_metadata(root: Path, manifest: Manifest) -> None:
    """Raise DamageError unless metadata and coordinate files are those the manifest was written with."""
    for split, ids in manifest.splits.items():
        for spec in arrays(manifest.schema, len(ids)):
            name = f"{split}.zarr/{spec.path}/zarr.json"
            if name not in manifest.metadata:
                raise DamageError(f"the manifest of {root} does not list {name}")
    for name, stated in manifest.metadata.items():
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise DamageError(f"the manifest of {root} lists {name!r}, which is outside of the store")
        try:
            content = (root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DamageError(f"{root / name} is missing") from None
        if hashlib.sha256(content).hexdigest() != stated and not is_next(root, name, content):
            raise DamageError(f"{root / name} is not the file that the store was made with")


def is_next(root: Path, name: str, content: bytes) -> bool:
    """Whether a metadata file is that of a store which is about to grow (growth)."""
    try:
        following = read_manifest(root, NEXT_MANIFEST)
    except (StoreError, OSError):
        return False
    return following.metadata.get(name) == hashlib.sha256(content).hexdigest()
