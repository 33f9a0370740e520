"""One step: a batch in parts has the gradient of the whole, a long one is cut, what is no number stops."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmdiff_cache.tasks
from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError, DataError, TrainingError
from mmdiff_cache.loader import Batch
from mmdiff_cache.records import LabelSpec, PreparedSample
from mmdiff_cache.store import checks
from mmdiff_cache.store.reader import open_store
from mmdiff_cache.tasks import TASKS
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.build import Model, Part, build_model, for_task, set_up
from mmdiff_cache.training.division import divide
from mmdiff_cache.training.folder import read_metrics
from mmdiff_cache.training.resolve import resolve
from mmdiff_cache.training.run import load_run, train
from mmdiff_cache.training.scoring import autocast, forward_batch
from mmdiff_cache.training.step import compute_gradient, limit_gradient
from tests.learnable import IGNORE, make_sample, write_store
from tests.training.conftest import TINY, small_config

BLANK = ("blocks-train-000001", "blocks-train-000004")
FIRST_ROWS = "blocks-train-000002"
QUIET = replace(TINY, dropout=0.0)


def partly_void(sample_id: str) -> PreparedSample:
    """Some pictures without a known pixel, and one with few: parts of a batch know very different amounts."""
    sample = make_sample(sample_id)
    hidden = slice(None) if sample_id in BLANK else slice(3, None) if sample_id == FIRST_ROWS else slice(0)
    for labels in (sample.labels, sample.original_labels):
        for name, label in labels.items():
            label[hidden] = 0 if name == "depth" else IGNORE
    return sample


@pytest.fixture(scope="module")
def void_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("void") / "s", train=8, test=1, sample=partly_void)


def prepared(store: Path, **changes: object) -> tuple[Part, Model, Batch]:
    setup = set_up(resolve(small_config(store, aggregator=QUIET, batch_size=7, holdout=0.0, **changes)))
    [part] = setup.parts
    torch.manual_seed(0)
    model = for_task(build_model(setup.spec).train(), part.task.name)
    return part, model, part.samples.batch(range(7))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", ["segmentation", "saliency", "depth"])
@pytest.mark.parametrize("parts", [3, 50])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(void_store: Path, task: str, parts: int) -> None:
    part, model, batch = prepared(void_store, task=task)
    whole = compute_gradient(model, batch, part.task, part.label)
    expected = gradients(model)
    outputs = forward_batch(model, batch)
    plain = part.task.loss(outputs, batch.targets[part.task.label], part.label)
    assert whole == pytest.approx(plain.item(), rel=1e-6)
    assert compute_gradient(model, batch, part.task, part.label, parts=parts) == pytest.approx(
        whole, rel=1e-5
    )
    found = gradients(model)
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_a_plain_mean_of_the_parts_would_be_another_loss(void_store: Path) -> None:
    """What the test above would miss if unknown pixels lay evenly."""
    part, model, batch = prepared(void_store)
    whole = compute_gradient(model, batch, part.task, part.label)
    outputs, target = forward_batch(model, batch), batch.targets["segmentation"]
    halves = [part.task.loss(outputs[rows], target[rows], part.label) for rows in (slice(3), slice(3, 7))]
    assert abs(torch.stack(halves).mean().item() - whole) > 1e-3


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("task", ["segmentation", "saliency", "depth"])
def test_a_batch_without_a_known_pixel_has_no_gradient(void_store: Path, task: str, parts: int) -> None:
    part, model, _ = prepared(void_store, task=task)
    batch = part.samples.batch([1, 4])
    assert compute_gradient(model, batch, part.task, part.label, parts=parts) == 0
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert limit_gradient(model, 1.0, batch.ids) == 0


def test_a_training_goes_on_past_batches_without_a_known_pixel(void_store: Path, tmp_path: Path) -> None:
    run = train(small_config(void_store, tmp_path / "run", holdout=0.0, batch_size=1, steps=16))
    losses = [line["loss"] for line in read_metrics(run.path)]
    assert losses.count(0.0) == 4, "two of eight samples, twice"
    assert all(
        torch.isfinite(x).all() for x in checkpoint.read_group(run.path / "last.safetensors", "raw").values()
    )


def test_a_long_gradient_is_cut_to_the_length_asked_for(void_store: Path) -> None:
    part, model, batch = prepared(void_store)
    compute_gradient(model, batch, part.task, part.label)
    before = gradients(model)
    norm = torch.cat([gradient.flatten() for gradient in before.values()]).norm().item()
    assert limit_gradient(model, None, batch.ids) == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in before.items())
    assert limit_gradient(model, norm / 4, batch.ids) == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[name] / 4, rtol=1e-4, atol=1e-9)
    assert limit_gradient(model, norm, batch.ids) == pytest.approx(norm / 4, rel=1e-4)


def test_a_training_clips_and_notes_the_length_before(learnable_store: Path, tmp_path: Path) -> None:
    """AdamW forgets a common factor of all gradients, so what clipping does shows at its first moments."""
    free, cut = (
        train(small_config(learnable_store, tmp_path / f"{clip}", steps=1, clip=clip))
        for clip in (None, 1e-3)
    )
    norms = [read_metrics(run.path)[0]["gradient_norm"] for run in (free, cut)]
    assert norms[0] == norms[1] > 1e-3
    moments = [checkpoint.read_group(run.path / "last.safetensors", "optimiser") for run in (free, cut)]
    name = next(name for name in moments[0] if name.endswith("/exp_avg"))
    torch.testing.assert_close(moments[1][name], moments[0][name] * (1e-3 / norms[0]), rtol=1e-3, atol=1e-9)


def test_a_training_in_parts_learns_the_same(learnable_store: Path, tmp_path: Path) -> None:
    runs = [
        train(
            small_config(learnable_store, tmp_path / str(parts), aggregator=QUIET, steps=3, accumulate=parts)
        )
        for parts in (1, 3)
    ]
    losses = [[line["loss"] for line in read_metrics(run.path) if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"accumulate": 5}, r"accumulate must be at most batch_size \(4\), got 5"),
        ({"accumulate": 0}, "accumulate must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"checks": 0}, "checks must be positive"),
        ({"patience": 0}, "patience must be positive"),
        ({"patience": 2, "holdout": 0.0}, "patience needs held-out samples .*holdout=0.1"),
    ],
)
def test_wrong_choices_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small_config(Path("store"), **changes)


def test_parts_are_checked_against_the_batch_size_of_the_task(learnable_store: Path) -> None:
    config = TrainConfig(task="depth", stores=(str(learnable_store),), accumulate=9)
    with pytest.raises(ConfigError, match=r"at most batch_size \(8\), got 9"):
        resolve(config)


def wrongly_labelled(sample_id: str) -> PreparedSample:
    sample = make_sample(sample_id)
    if sample_id == "blocks-train-000003":
        for labels in (sample.labels, sample.original_labels):
            labels["segmentation"][5, 6] = 9
            labels["saliency"][5, 6] = 2
    return sample


@pytest.mark.parametrize(
    ("task", "known"),
    [("segmentation", "the id 9, but its ids are 0 to 3 and 255"), ("saliency", "the id 2")],
)
def test_an_id_that_is_none_stops_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, known: str
) -> None:
    """A store that was not written by us: ours fail such a sample when it is written."""
    with monkeypatch.context() as patched:
        patched.setattr(checks, "stray_id", lambda *_: None)
        store = write_store(tmp_path / "s", train=4, test=1, sample=wrongly_labelled)
    reader, whole = open_store(store)["train"], resolve(small_config(store, task=task, holdout=0.25))
    scored = next(
        seed for seed in range(99) if divide(replace(whole, subset_seed=seed), reader, task).held_out == (3,)
    )
    for changes in ({"holdout": 0.0}, {"holdout": 0.25, "subset_seed": scored}):
        config = small_config(store, tmp_path / f"{changes}", task=task, batch_size=2, **changes)
        with pytest.raises(DataError, match=known) as caught:
            train(config)
        assert "blocks-train-000003" in str(caught.value)
        assert "\n" not in str(caught.value)


def broken_gradient(outputs: Tensor, target: Tensor, label: LabelSpec) -> Tensor:
    """A finite loss whose gradient is none: the root of nothing."""
    return (outputs - outputs.detach()).square().sum().sqrt()


def spoil(monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor]) -> None:
    changed = replace(TASKS["segmentation"], loss=loss)
    monkeypatch.setattr(mmdiff_cache.tasks, "TASKS", {**TASKS, "segmentation": changed})


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_by_name_and_the_last_checkpoint_goes_on(
    learnable_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    steps = iter(range(100))

    def fails_at_the_sixth(outputs: Tensor, target: Tensor, label: LabelSpec) -> Tensor:
        if next(steps) == 5:
            return outputs.sum() * float("nan") if what == "loss" else broken_gradient(outputs, target, label)
        return TASKS["segmentation"].loss(outputs, target, label)

    config = small_config(learnable_store, tmp_path / "run", precision="bfloat16")
    with monkeypatch.context() as patch:
        spoil(patch, fails_at_the_sixth)
        says = (
            rf"the {what} became nan at step 6, on samples blocks-train-\d+, .*lower learning_rate .*float32"
        )
        with pytest.raises(TrainingError, match=says):
            train(config)
    assert load_run(tmp_path / "run").step == 5
    weights = checkpoint.read_group(tmp_path / "run/last.safetensors", "raw")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert train(config).finished


def test_bfloat16_covers_every_matrix_and_kernel(learnable_store: Path) -> None:
    """All that multiplies works in bfloat16; what comes out for loss and metric is float32."""
    part, model, batch = prepared(learnable_store, decoder="deeplabv3plus")
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: seen.update({name: output.dtype})

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(note(name))
    outputs = forward_batch(model, batch, precision="bfloat16")
    assert outputs.dtype == torch.float32
    assert {name for name, dtype in seen.items() if dtype != torch.bfloat16} == set()
    assert len(seen) > 10
    compute_gradient(model, batch, part.task, part.label, parts=2, precision="bfloat16")
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    with autocast(torch.device("cpu"), "float32"):
        assert not torch.is_autocast_enabled("cpu")
    assert np.isfinite(limit_gradient(model, 1.0, batch.ids))
