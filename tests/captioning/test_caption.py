"""Captions by a tiny Gemma 3: against a loop of plain transformers, resumed, refused, and read by extract."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Gemma3ForConditionalGeneration

from mmdiff_cache.captioning.caption_file import CaptionFile, meta_path
from mmdiff_cache.captioning.captioner import INSTRUCTION, hash_model, locate_model
from mmdiff_cache.captioning.run import CaptionConfig, caption
from mmdiff_cache.cli.app import run as command_line
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.datasets.base import Dataset
from mmdiff_cache.datasets.registry import DATASETS, DatasetEntry
from mmdiff_cache.errors import BackboneError, ConfigError, DataError
from mmdiff_cache.extraction.plan import plan
from mmdiff_cache.records import Sample
from tests.tiny_gemma import save_tiny_gemma

PICTURES, TOKENS = 5, 10


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gemma(tmp_path_factory.mktemp("captioners") / "tiny-gemma")


@pytest.fixture
def config(gemma: Path, tmp_path: Path) -> CaptionConfig:
    """Five pictures of several sizes."""
    (tmp_path / "pictures").mkdir()
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + 9 * number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels // (number + 1)).save(tmp_path / "pictures" / f"{number}.png")
    return CaptionConfig(
        dataset="images",
        data_root=str(tmp_path / "pictures"),
        out=str(tmp_path / "captions.jsonl"),
        model=str(gemma),
        dtype="float32",
        device="cpu",
        max_tokens=TOKENS,
    )


def lines(config: CaptionConfig) -> dict[str, str]:
    values = [json.loads(line) for line in Path(config.out).read_text().splitlines()]
    assert all(list(value) == ["sample_id", "prompt"] for value in values)
    return {value["sample_id"]: value["prompt"] for value in values}


@torch.no_grad()
def greedy(folder: Path, picture: Path) -> str:
    """The likeliest token, again and again, by forward passes of the whole sequence."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Gemma3ForConditionalGeneration.from_pretrained(folder).eval()
    text = f"<bos><start_of_turn>user\n<start_of_image>{INSTRUCTION}<end_of_turn>\n<start_of_turn>model\n"
    inputs = processor(
        images=[[Image.open(picture)]], text=[text], return_tensors="pt", add_special_tokens=False
    )
    tokens, kinds = inputs["input_ids"], inputs["token_type_ids"]
    for _ in range(TOKENS):
        logits = model(
            input_ids=tokens,
            token_type_ids=kinds,
            attention_mask=torch.ones_like(tokens),
            pixel_values=inputs["pixel_values"],
        ).logits
        chosen = logits[:, -1].argmax(-1, keepdim=True)
        if int(chosen) == processor.tokenizer.eos_token_id:
            break
        tokens, kinds = torch.cat((tokens, chosen), 1), torch.cat((kinds, torch.zeros_like(chosen)), 1)
    written = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(written.split())


def test_captions_are_those_of_plain_greedy_decoding(config: CaptionConfig, gemma: Path) -> None:
    captions = caption(config)
    assert (captions.total, dict(captions.unreadable)) == (PICTURES, {})
    found = lines(config)
    assert list(found) == [f"{number}.png" for number in range(PICTURES)]
    assert len(set(found.values())) > 1
    for name in ("0.png", "4.png"):
        assert found[name] == greedy(gemma, Path(str(config.data_root)) / name)
    meta = json.loads(meta_path(Path(config.out)).read_text())
    assert meta["instruction"] == INSTRUCTION
    assert meta["model"] == str(gemma)
    assert meta["weights_sha256"] == hash_model(gemma)


def test_the_documentation_gives_the_instruction() -> None:
    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    assert INSTRUCTION in " ".join(page.read_text().replace("\n>", " ").split())


def test_pictures_at_once_get_the_same_words(config: CaptionConfig, tmp_path: Path) -> None:
    caption(config)
    together = replace(config, out=str(tmp_path / "together.jsonl"), batch_size=2)
    caption(together)
    assert lines(together) == lines(config)


def test_the_splits_are_those_of_a_folders_list(config: CaptionConfig) -> None:
    rows = [{"file_name": f"{n}.png", "split": split} for n, split in enumerate(("train", "train", "val"))]
    (Path(str(config.data_root)) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    caption(replace(config, splits=("val",), max_tokens=2))
    assert list(lines(config)) == ["2.png"]
    caption(replace(config, max_tokens=2))
    assert sorted(lines(config)) == ["0.png", "1.png", "2.png"]
    with pytest.raises(ConfigError, match="split 'all' is not one of images: train, val"):
        caption(replace(config, splits=("all",)))


def test_extract_reads_the_file(config: CaptionConfig, tiny_flux_folder: Path, tmp_path: Path) -> None:
    caption(config)
    planned = plan(
        ExtractConfig(
            dataset="images",
            data_root=config.data_root,
            prompts=config.out,
            backbone=str(tiny_flux_folder),
            store=str(tmp_path / "store"),
        )
    )
    sample = planned.dataset.load("all", 3)
    assert planned.prompts.prompt(sample) == lines(config)["3.png"]


@pytest.mark.parametrize("size", [1, 2])
def test_an_interrupted_run_ends_with_the_same_bytes(
    size: int, config: CaptionConfig, tmp_path: Path
) -> None:
    config = replace(config, batch_size=size)
    caption(config)
    whole = Path(config.out).read_bytes()
    again = replace(config, out=str(tmp_path / "again.jsonl"))

    def interrupt(done: int, total: int, state: str) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(again, interrupt)
    left = Path(again.out).read_bytes()
    assert whole.startswith(left)
    assert len(left) < len(whole)
    Path(again.out).write_bytes(left[:-4])  # the power fails inside a line
    caption(again)
    assert Path(again.out).read_bytes() == whole


def test_a_finished_file_needs_no_model(config: CaptionConfig, gemma: Path, tmp_path: Path) -> None:
    config = replace(config, model=str(shutil.copytree(gemma, tmp_path / "gone")))
    caption(config)
    shutil.rmtree(tmp_path / "gone")
    assert caption(config).total == PICTURES


def test_a_file_has_one_origin(config: CaptionConfig, gemma: Path, tmp_path: Path) -> None:
    caption(replace(config, limit=2))
    with pytest.raises(ConfigError, match=f"was made with max_tokens {TOKENS}, 3 was asked; choose another"):
        caption(replace(config, max_tokens=3))
    other = save_tiny_gemma(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="was made with model"):
        caption(replace(config, model=str(other)))
    meta_path(Path(config.out)).unlink()
    with pytest.raises(ConfigError, match=r"no captions.jsonl.meta.json says what made them"):
        caption(config)


def test_foreign_lines_and_names_are_refused(config: CaptionConfig) -> None:
    Path(config.out).write_text('{"sample_id": "0.png", "prompt": "x"}\nnonsense\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        caption(config)
    with pytest.raises(ConfigError, match=r"go to a file FILE.jsonl"):
        caption(replace(config, out="captions.txt"))


def test_one_process_writes_a_file(config: CaptionConfig) -> None:
    with (
        CaptionFile(Path(config.out), {}),
        pytest.raises(ConfigError, match="being written by another process"),
    ):
        caption(config)


def test_a_picture_that_cannot_be_read_is_named_and_left_out(
    config: CaptionConfig, gemma: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(str(config.data_root)) / "1.png").write_bytes(b"not a picture")
    words = ["caption", "--dataset", "images", "--data-root", str(config.data_root), "--out", config.out]
    words += ["--model", str(gemma), "--set", "dtype=float32", "--set", "max_tokens=4", "--set", "device=cpu"]
    assert command_line(words) == 3
    assert list(lines(config)) == ["0.png", "2.png", "3.png", "4.png"]
    printed = capsys.readouterr()
    assert "captions of 4 of 5 samples" in printed.out
    assert "extract --dataset images --data-root" in printed.out
    assert "--limit" not in printed.out
    assert "'1.png'" in printed.err
    assert command_line([*words, "--limit", "1"]) == 0
    assert "--limit 1 --prompts" in capsys.readouterr().out, "others have no caption yet"


def test_missing_weights_are_answered_with_what_helps(config: CaptionConfig, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="google/gemma-3-4b-it are not on this machine") as caught:
        caption(replace(config, model="google/gemma-3-4b-it"))
    for word in ("Gemma Terms of Use", "hf auth login", "--model FOLDER", "--prompts empty"):
        assert word in str(caught.value)
    assert not Path(config.out).exists()
    (tmp_path / "half").mkdir()
    with pytest.raises(BackboneError, match=r"half/config.json is missing"):
        locate_model(str(tmp_path / "half"))
    with pytest.raises(ConfigError, match="model must be a folder or a repository"):
        locate_model("gemma")


def test_a_weight_that_the_file_lacks_is_not_made_up(
    config: CaptionConfig, gemma: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gemma, tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("self_attn.q_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"weights of lacking .* lack .*self_attn\.q_proj\.weight"):
        caption(replace(config, model=str(folder)))


class Twins(Dataset):
    """The same name in two splits."""

    def sample_ids(self, split: str) -> list[str]:
        return ["twin"]

    def load(self, split: str, index: int) -> Sample:
        return Sample(sample_id="twin", image=np.zeros((32, 32, 3), np.uint8))


def test_what_cannot_be_described_is_refused(config: CaptionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = DatasetEntry(
        name="twins",
        summary="",
        open=lambda root, resolution: Twins(),
        splits={"train": None, "test": None},
        backbone="flux-scenes",
        concepts={},
        needs_root=False,
    )
    monkeypatch.setitem(DATASETS, "twins", entry)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="sample 'twin' is in the splits train and test"):
        caption(replace(config, dataset="twins"))
    with pytest.raises(ConfigError, match="has its prompts, and no pictures"):
        caption(replace(config, dataset="prompts"))
    with pytest.raises(ConfigError, match="split 'val' is not one of images: all"):
        caption(replace(config, splits=("val",)))
    with pytest.raises(ConfigError, match="batch_size must be positive"):
        replace(config, batch_size=0)
