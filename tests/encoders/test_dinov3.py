"""DINOv3's features are those of transformers' own model, and what is no DINOv3 is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DINOv3ViTModel

from mmdiff_cache.encoders.dinov3 import DINOv3
from mmdiff_cache.encoders.registry import ENCODERS, describe_encoder, load_encoder
from mmdiff_cache.encoders.weights import hash_encoder
from mmdiff_cache.errors import BackboneError, ConfigError
from tests.tiny_dinov3 import CHANNELS, LAYERS, PATCH, PROCESSOR


@pytest.fixture(scope="module")
def encoder(tiny_dinov3_folder: Path) -> DINOv3:
    return load_encoder(describe_encoder(str(tiny_dinov3_folder)))


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_are_those_of_a_plain_forward(encoder: DINOv3, tiny_dinov3_folder: Path) -> None:
    """Hidden state n + 1 of transformers is the output of block n; the first 1 + 4 tokens are no patches."""
    model = DINOv3ViTModel.from_pretrained(tiny_dinov3_folder).eval()
    images = pictures(2, 64, 96)
    mean, deviation = (torch.tensor(PROCESSOR[name]) for name in ("image_mean", "image_std"))
    values = ((images / 255 - mean) / deviation).permute(0, 3, 1, 2)
    with torch.inference_mode():
        states = model(values, output_hidden_states=True).hidden_states
    got = encoder(images)
    assert got.shape == (2, 2, 4, 6, CHANNELS)
    assert got.dtype == torch.float32
    for place, layer in enumerate(LAYERS):
        expected = states[int(layer) + 1][:, 5:].reshape(2, 4, 6, CHANNELS)
        torch.testing.assert_close(got[:, place], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[:, 0], got[:, 1], atol=0.1)


def test_a_patch_is_where_its_pixels_are(encoder: DINOv3) -> None:
    """Rows come before columns, and the picture is not mirrored."""
    plain = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
    marked = plain.clone()
    marked[:, PATCH : 2 * PATCH, 3 * PATCH :] = pictures(1, PATCH, PATCH)
    change = (encoder(marked) - encoder(plain))[0, 0].norm(dim=-1)
    assert change.argmax() == 1 * 4 + 3


def test_the_same_batch_gives_the_same_bits_and_others_agree(
    encoder: DINOv3, tiny_dinov3_folder: Path
) -> None:
    images = pictures(3, 32, 32)
    fresh = load_encoder(describe_encoder(str(tiny_dinov3_folder)))
    assert torch.equal(encoder(images), fresh(images))
    torch.testing.assert_close(encoder(images[1:2]), encoder(images)[1:2], rtol=1e-4, atol=1e-5)


def test_the_papers_layers_and_the_same_depths_elsewhere() -> None:
    layers = {name: info.layers for name, info in ENCODERS.items()}
    assert layers == {
        "dinov3-vits16": ("2", "11"),
        "dinov3-vitb16": ("2", "11"),
        "dinov3-vitl16": ("4", "23"),
    }


def test_a_picture_must_be_whole_patches() -> None:
    assert ENCODERS["dinov3-vitb16"].grid(512) == (32, 32)
    with pytest.raises(
        ConfigError, match=r"multiple of 16, the patch of dinov3-vitb16, got 500; .* 496 or 512"
    ):
        ENCODERS["dinov3-vitb16"].grid(500)


def test_what_is_no_encoder_is_refused_with_the_names(tmp_path: Path, tiny_flux_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dino' is neither .* \(dinov3-vits16, dinov3-vitb16, "):
        describe_encoder("dino")
    with pytest.raises(BackboneError, match=r"has no config\.json"):
        describe_encoder(str(tmp_path))
    with pytest.raises(BackboneError, match=r"holds a model of type 't5'; .* dinov3_vit"):
        describe_encoder(str(tiny_flux_folder / "text_encoder_2"))


def test_missing_weights_come_with_lines_that_help_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mmdiff_cache.encoders.registry import describe_encoder, load_encoder\n"
        "from mmdiff_cache.errors import BackboneError\n"
        "try:\n    load_encoder(describe_encoder('dinov3-vitb16'))\n"
        "except BackboneError as error:\n    print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    first, *lines = done.stdout.splitlines()
    assert first.startswith("the weights of dinov3-vitb16 are not on this machine (not in the local cache")
    assert "accept the DINOv3 License at https://huggingface.co/facebook/dinov3-vitb16-" in lines[0]
    assert [line.split()[0] for line in lines] == ["accept", "--discriminative", "without"]


@pytest.fixture
def copy(tiny_dinov3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dinov3_folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_by_file(name: str, copy: Path) -> None:
    (copy / name).rename(copy / f"{name}.bin")
    with pytest.raises(BackboneError, match=f"{name} is missing"):
        load_encoder(describe_encoder(str(copy)))


def test_weights_that_lack_a_part_are_not_filled_with_noise(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    gone = next(name for name in tensors if "layer.2" in name)
    del tensors[gone]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"lack .*layer\.2"):
        load_encoder(describe_encoder(str(copy)))


def test_damaged_weights_are_a_backbone_error(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_encoder(describe_encoder(str(copy)))


def test_a_processor_without_normalisation_is_refused(copy: Path) -> None:
    (copy / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"do_normalize": False}))
    with pytest.raises(BackboneError, match="must rescale and normalise"):
        load_encoder(describe_encoder(str(copy)))
    (copy / "preprocessor_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="does not say how"):
        load_encoder(describe_encoder(str(copy)))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_the_hash_changes_with_every_file_that_decides_features(name: str, copy: Path) -> None:
    before = hash_encoder(copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert hash_encoder(copy) != before
