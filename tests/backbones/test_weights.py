"""Where weights are looked for, what is said when they are missing, and how they are told apart."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mmdiff_cache.backbones.registry import describe, load_backbone, load_text_encoders
from mmdiff_cache.backbones.weights import hash_weights, locate, weight_files
from mmdiff_cache.errors import BackboneError, ConfigError

REVISION = "0" * 40


def cache_as_flux_dev(
    folder: Path, hub_cache: Path, name: str = "models--black-forest-labs--FLUX.1-dev"
) -> Path:
    """Lay a pipeline out as the hub's client caches FLUX.1-dev: blobs named by hash, a snapshot of links."""
    repository = hub_cache / name
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_missing_weights_come_with_three_lines_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mmdiff_cache.backbones.registry import describe\n"
        "from mmdiff_cache.backbones.weights import locate\n"
        "from mmdiff_cache.errors import BackboneError\n"
        "try:\n    locate(describe('flux-dev'), download=True)\n"
        "except BackboneError as error:\n    print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    first, *lines = done.stdout.splitlines()
    assert first.startswith("the weights of flux-dev are not on this machine (not in the local cache")
    assert [line.split()[0] for line in lines] == ["accept", "--backbone", "--backbone"]
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in lines[0]
    assert lines[0].endswith("hf auth login")
    assert lines[2].split(maxsplit=2)[1:] == [
        "flux-scenes",
        "runs here now; trained on rendered scenes: for trying the pipeline, not for scores on photographs",
    ]


def test_an_unreachable_hub_is_the_same_error(tmp_path: Path) -> None:
    code = (
        "from mmdiff_cache.backbones.registry import describe\n"
        "from mmdiff_cache.backbones.weights import locate\n"
        "locate(describe('flux-dev'), download=True)"
    )
    unreachable = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | unreachable, capture_output=True, text=True
    )
    assert "BackboneError: the weights of flux-dev are not on this machine" in done.stderr
    assert "and the hub gave: " in done.stderr


def test_the_local_cache_of_the_hub_is_found(
    tmp_path: Path, tiny_flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_as_flux_dev(tiny_flux_folder, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert locate(describe("flux-dev")) == snapshot
    (snapshot / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"text_encoder_2/model\.safetensors is not in the local cache"):
        locate(describe("flux-dev"))


def test_blobs_of_the_cache_are_not_read_to_be_hashed(tmp_path: Path, tiny_flux_folder: Path) -> None:
    snapshot = cache_as_flux_dev(tiny_flux_folder, tmp_path)
    before = hash_weights(snapshot)
    (snapshot / "transformer" / "diffusion_pytorch_model.safetensors").resolve().write_bytes(b"")
    assert hash_weights(snapshot) == before


def test_an_incomplete_folder_is_refused_by_file(tmp_path: Path, tiny_flux_folder: Path) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        load_backbone(describe(str(folder)))


def test_pickled_weights_are_never_loaded(tmp_path: Path, tiny_flux_folder: Path) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BackboneError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        load_backbone(describe(str(folder)))


def test_damaged_weights_are_a_backbone_error(tmp_path: Path, tiny_flux_folder: Path) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(describe(str(folder)))


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        ("transformer/diffusion_pytorch_model", "proj_out.weight"),
        ("vae/diffusion_pytorch_model", "decoder.conv_out.weight"),
        ("text_encoder/model", "embeddings.token_embedding.weight"),
        ("text_encoder_2/model", "encoder.final_layer_norm.weight"),
    ],
)
def test_a_weight_that_the_files_lack_is_not_made_up(
    file: str, weight: str, tmp_path: Path, tiny_flux_folder: Path
) -> None:
    """Diffusers would leave it empty, and transformers fill it with random numbers, other ones each time."""
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    weights = load_file(folder / f"{file}.safetensors")
    del weights[weight]
    save_file(weights, folder / f"{file}.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=f"lack .*{weight}"):
        load_backbone(describe(str(folder)))
    if file.startswith("text"):
        with pytest.raises(BackboneError, match=f"lack .*{weight}"):
            load_text_encoders(describe(str(folder)))


def test_clip_weights_under_their_published_names_are_whole(tmp_path: Path, tiny_flux_folder: Path) -> None:
    """Those of FLUX.1 begin with `text_model`, and some have positions, which are no weights."""
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": weight for name, weight in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, file, metadata={"format": "pt"})
    renamed, plain = (load_backbone(describe(str(one))) for one in (folder, tiny_flux_folder))
    assert torch.equal(renamed.encode_prompts(["near"]).pooled, plain.encode_prompts(["near"]).pooled)


@pytest.mark.parametrize(
    "file",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "vae/config.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_the_hash_changes_with_every_file_that_decides_features(
    file: str, tmp_path: Path, tiny_flux_folder: Path
) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    assert hash_weights(folder) == hash_weights(tiny_flux_folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert hash_weights(folder) != hash_weights(tiny_flux_folder)


def test_the_hash_ignores_what_is_not_loaded(tmp_path: Path, tiny_flux_folder: Path) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    (folder / "README.md").write_text("a card")
    (folder / "flux1-dev.safetensors").write_bytes(b"single-file copy")
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant")
    assert hash_weights(folder) == hash_weights(tiny_flux_folder)


def test_shards_are_listed_by_their_index(tmp_path: Path, tiny_flux_folder: Path) -> None:
    folder = shutil.copytree(tiny_flux_folder, tmp_path / "copy")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "part-2.safetensors", "b": "part-1.safetensors", "c": "part-1.safetensors"}}'
    )
    assert weight_files(folder)[:3] == [
        "transformer/part-1.safetensors",
        "transformer/part-2.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_any_repository_of_the_family_is_described_and_loaded_from_the_cache(
    tmp_path: Path, tiny_flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_as_flux_dev(tiny_flux_folder, tmp_path, "models--someone--tiny")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    info, local = describe("someone/tiny"), describe(str(tiny_flux_folder))
    assert (info.name, info.source, info.dtype) == ("tiny", "someone/tiny", "bfloat16")
    assert info.architecture == local.architecture
    assert (info.layers, info.text_length) == (local.layers, local.text_length)
    assert locate(info) == snapshot
    assert tuple(load_backbone(info).blocks) == info.blocks
    for file in snapshot.rglob("*.safetensors"):
        file.unlink()
    assert describe("someone/tiny") == info, "configuration files are enough for a plan"
    with pytest.raises(BackboneError, match="the weights of tiny are not on this machine"):
        locate(info)


def test_a_repository_out_of_reach_is_refused_with_the_lines_to_type(
    tmp_path: Path, tiny_flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match="the configuration of someone/tiny cannot be had") as said:
        describe("someone/tiny")
    first, *lines = str(said.value).splitlines()
    assert "hub" in first
    assert [line.split()[0] for line in lines] == ["hf", "hf", "--backbone"]
    snapshot = cache_as_flux_dev(tiny_flux_folder, tmp_path, "models--someone--tiny")
    (snapshot / "vae" / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"vae/config\.json is not in the local cache"):
        describe("someone/tiny")


def test_what_is_no_name_no_folder_and_no_repository_is_refused() -> None:
    for name in ("nothing", "a/b/c", "../folder", "./x y"):
        with pytest.raises(ConfigError, match="neither a backbone"):
            describe(name)
