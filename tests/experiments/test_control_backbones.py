"""A backbone of initial weights: whole, made once, and of the same shape as the one it stands beside."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmdiff_cache.backbones.registry import describe
from mmdiff_cache.backbones.weights import locate
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments import control_backbones as module
from mmdiff_cache.experiments.control_backbones import random_backbone, younger_backbone


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMDIFF_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def weights(folder: Path, part: str) -> dict[str, list[float]]:
    (file,) = (folder / part).glob("*.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in load_file(file).items()}


def test_the_transformer_alone_is_another(tiny_flux_folder: Path, data: Path) -> None:
    made = Path(random_backbone(str(tiny_flux_folder)))
    assert made == data / "backbones" / f"{tiny_flux_folder.name}-random"
    locate(describe(str(made)))
    assert describe(str(made)).architecture == describe(str(tiny_flux_folder)).architecture
    ours, theirs = (weights(folder, "transformer") for folder in (made, tiny_flux_folder))
    assert {name: len(values) for name, values in ours.items()} == {n: len(v) for n, v in theirs.items()}
    assert sum(ours[name] != theirs[name] for name in ours) > len(ours) / 2
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_it_is_made_once_and_always_the_same(tiny_flux_folder: Path) -> None:
    made = Path(random_backbone(str(tiny_flux_folder)))
    before = weights(made, "transformer")
    time = (made / "model_index.json").stat().st_mtime_ns
    assert random_backbone(str(tiny_flux_folder)) == str(made)
    assert (made / "model_index.json").stat().st_mtime_ns == time
    made.rename(made.with_name("other"))
    random_backbone(str(tiny_flux_folder))
    assert weights(made, "transformer") == before


def test_of_large_and_absent_ones_nothing_is_made(
    tiny_flux_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 10)
    for name in (str(tiny_flux_folder), "flux-dev", "sd35-large"):
        with pytest.raises(ConfigError, match="is neither a backbone"):
            describe(random_backbone(name))
    assert not data.exists()


def test_younger_ones_are_trained_elsewhere_and_named_by_their_share(data: Path) -> None:
    assert Path(younger_backbone("flux-scenes", 0.1)) == data / "backbones" / "flux-scenes-10"
    with pytest.raises(ConfigError, match="is neither a backbone"):
        describe(younger_backbone("flux-scenes", 0.3))
