"""A checkpoint gives back what was put in, survives a crash while it is written, and is refused when it does
not fit.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmdiff_cache.errors import CheckpointError, StorageError
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.checkpoint import EMA, RAW, Header

HEADER = Header(
    step=7, config={"task": "depth"}, spec={"kind": "mmdiff"}, store={"dataset": "blocks"}, best=0.25
)


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))


def written(path: Path, model: nn.Module | None = None) -> Path:
    checkpoint.save(path, HEADER, {RAW: (model or network()).state_dict()})
    return path


def test_round_trip(tmp_path: Path) -> None:
    path, model = tmp_path / "last.safetensors", network()
    checkpoint.save(path, HEADER, {RAW: model.state_dict(), EMA: {"x": torch.arange(3)}})
    assert checkpoint.read_header(path) == HEADER
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    checkpoint.load_weights(other, path, RAW)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert checkpoint.read_group(path, EMA)["x"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_anyone_can_read_it_and_nothing_in_it_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "last.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["mmdiff_cache"])["step"] == 7
    assert set(load_file(path)) == {"raw/0.weight", "raw/0.bias", "raw/1.weight", "raw/1.bias"}


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "last.safetensors")
    before = path.read_bytes()

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=r"no space left .* last complete one is unchanged"):
        written(path, network(5))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name], "what is half written takes no room"


def test_no_permission_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write checkpoint"):
        written(tmp_path / "absent" / "last.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_cut_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = written(tmp_path / "last.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cut or overwritten"):
        checkpoint.read_header(path)


def test_missing_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read_header(tmp_path / "last.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of this package"):
        checkpoint.read_header(tmp_path / "foreign.safetensors")
    values = json.dumps({"format_version": 2, "novelty": True})
    save_file({"x": torch.zeros(1)}, tmp_path / "newer.safetensors", {"mmdiff_cache": values})
    with pytest.raises(CheckpointError, match="version 2, this mmdiff-cache reads version 1"):
        checkpoint.read_header(tmp_path / "newer.safetensors")


def test_weights_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "last.safetensors")
    with pytest.raises(CheckpointError, match=r"'0.bias' has shape \(3,\), the model needs \(5,\)"):
        checkpoint.load_weights(network(5), path, RAW)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no tensor '2.bias'"):
        checkpoint.load_weights(nn.Sequential(*network(), nn.Linear(2, 2)), path, RAW)
    with pytest.raises(CheckpointError, match=r"the model has no tensor '1.bias'"):
        checkpoint.load_weights(nn.Sequential(nn.Linear(4, 3)), path, RAW)
    with pytest.raises(CheckpointError, match="holds no 'ema' weights"):
        checkpoint.load_weights(network(), path, EMA)


def test_the_optimiser_goes_on_exactly(tmp_path: Path) -> None:
    def steps(model: nn.Module, optimiser: torch.optim.Optimizer, first: int, last: int) -> None:
        for number in range(first, last):
            optimiser.zero_grad()
            model(torch.full((2, 4), float(number))).square().sum().backward()
            optimiser.step()

    whole, half, rest = network(), network(), network()
    optimisers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (whole, half, rest)]
    steps(whole, optimisers[0], 0, 6)
    steps(half, optimisers[1], 0, 3)
    groups = {RAW: half.state_dict(), "optimiser": checkpoint.pack_optimiser(optimisers[1])}
    checkpoint.save(tmp_path / "x.safetensors", HEADER, groups)
    checkpoint.load_weights(rest, tmp_path / "x.safetensors", RAW)
    checkpoint.unpack_optimiser(optimisers[2], checkpoint.read_group(tmp_path / "x.safetensors", "optimiser"))
    steps(rest, optimisers[2], 3, 6)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], tensor)
