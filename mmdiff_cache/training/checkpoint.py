"""Checkpoints: one safetensors file each, tensors and a JSON header, never a pickle.

`last.safetensors` holds all that a training needs to go on exactly: raw and averaged weights, the optimiser,
the random states. `best.safetensors` holds only the averaged weights that scored best on the held-out
samples. The header carries the step, the resolved configuration, the model's spec and the identity of the
store.
"""

import errno
import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdiff_cache.errors import CheckpointError, StorageError, StorageRefused

FORMAT_VERSION = 1
LAST, BEST = "last.safetensors", "best.safetensors"

RAW, EMA, OPTIMISER, RNG, BALANCE = "raw", "ema", "optimiser", "rng", "balance"
"""First part of a tensor's name: which group it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a checkpoint says about itself."""

    step: int
    config: Mapping[str, Any]
    """The resolved TrainConfig as JSON."""
    spec: Mapping[str, Any]
    """The model's spec as JSON."""
    store: Mapping[str, Any]
    """Identity of the store that it was trained on: `fingerprint`, `data_set`, `backbone`."""
    best: float | None = None
    """Best headline score on the held-out samples up to this step."""
    checks_since_best: int = 0
    """Checks since then without a better one: what early stopping counts."""


_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "lift the limit on the size of files (ulimit -f)",
    errno.EIO: "check the disk",
}
"""What helps where the place itself is right; after it the same command goes on."""

Groups = Mapping[str, Mapping[str, Tensor]]


def save(path: Path, header: Header, groups: Groups) -> None:
    """Write a checkpoint so that a crash at any moment leaves either the old file or the new one.

    Raises StorageError when the file system refuses.
    """
    tensors = {
        f"{group}/{name}": tensor.detach().to("cpu").contiguous()
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    values = {"format_version": FORMAT_VERSION, **{name: getattr(header, name) for name in Header.__slots__}}
    metadata = {"mmdiff_cache": json.dumps(values, sort_keys=True)}
    with _written_aside(path, f"checkpoint {path}", "; the last complete one is unchanged") as partial:
        save_file(tensors, partial, metadata)


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any, option: str = "--run") -> None:
    """Write a JSON document atomically. Raises StorageError when the file system refuses."""
    write_bytes(path, (json.dumps(values, indent=2, sort_keys=False) + "\n").encode(), option)


def write_bytes(path: Path, content: bytes, option: str = "--run") -> None:
    """Write a file atomically. Raises StorageError, which names the option that chose the place, when the
    file system refuses.
    """
    with _written_aside(path, str(path), option=option) as partial:
        partial.write_bytes(content)


@contextmanager
def _written_aside(path: Path, what: str, kept: str = "", option: str = "--run") -> Generator[Path]:
    """A name beside a file, whose content takes the file's place, durably, once it is complete."""
    partial = path.with_name(partial_name(path.name))
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # room for others
            partial.unlink(missing_ok=True)
        raise refusal(what, error, kept, option) from error


def partial_name(name: str) -> str:
    """What a file is called while it is being written."""
    return f".{name}.partial"


def refusal(what: str, error: Exception, kept: str = "", option: str = "--run") -> StorageError:
    """The one line for a file system that refuses; StorageRefused where only another place would help."""
    code = error.errno if isinstance(error, OSError) else _code_of(error)
    reason = os.strerror(code).lower() if code else str(error)
    remedy = _REMEDIES.get(code or 0)
    if remedy is None:
        return StorageRefused(f"cannot write {what}: {reason}{kept}; choose another place with {option}")
    return StorageError(f"cannot write {what}: {reason}{kept}; {remedy} and run the same command again")


def _code_of(error: Exception) -> int | None:
    """The system's error number inside of safetensors' own error, which has it as text."""
    found = re.search(r"(?:os error|code:) (\d+)", str(error))
    return int(found[1]) if found else None


def read_header(path: Path) -> Header:
    """The header alone. Raises CheckpointError for a missing, damaged, foreign or newer file."""
    with _open(path) as file:
        text = (file.metadata() or {}).get("mmdiff_cache")
    if text is None:
        raise CheckpointError(f"{path} has no mmdiff_cache header: it is not a checkpoint of this package")
    try:
        values = dict(json.loads(text))
        version = values.pop("format_version")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {version}, this mmdiff-cache reads version {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    try:
        return Header(**values)
    except TypeError as error:
        raise CheckpointError(
            f"{path} has a header with other fields than this package's: {error}"
        ) from error


def read_group(path: Path, group: str) -> dict[str, Tensor]:
    """All tensors of one group, by their names within it. Raises CheckpointError if there is none."""
    with _open(path) as file:
        names = [name for name in file.keys() if name.startswith(f"{group}/")]  # noqa: SIM118 - not a dict
        tensors = {name.removeprefix(f"{group}/"): file.get_tensor(name) for name in names}
    if not tensors:
        raise CheckpointError(f"{path} holds no {group!r} weights")
    return tensors


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: the training has not reached its first checkpoint"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; it was cut or overwritten") from error


def check_shapes(model: torch.nn.Module, path: Path, group: str) -> None:
    """Raise CheckpointError unless a group has the model's tensors. The model may be a `meta` one."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with _open(path) as file:
        names = [name for name in file.keys() if name.startswith(f"{group}/")]  # noqa: SIM118 - not a dict
        found = {name.removeprefix(f"{group}/"): tuple(file.get_slice(name).get_shape()) for name in names}
    if not found:
        raise CheckpointError(f"{path} holds no {group!r} weights")
    for name in sorted(found.keys() ^ wanted.keys()):
        where = "the checkpoint" if name in wanted else "the model"
        raise CheckpointError(
            f"{path}: {where} has no tensor {name!r}; it was trained with another configuration"
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {shape}, the model needs {wanted[name]}"
            )


def load_weights(model: torch.nn.Module, path: Path, group: str) -> None:
    """Fill a model from a group of a checkpoint. Raises CheckpointError naming a tensor that does not fit."""
    check_shapes(model, path, group)
    model.load_state_dict(read_group(path, group))


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's running averages and step counts as flat tensors named `<parameter>/<what>`."""
    state = optimiser.state_dict()["state"]
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, members in state.items()
        for key, value in members.items()
    }


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `pack_optimiser` took; rates and decay come from the configuration."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
