"""Every entry of TASKS is whole: its loss, prediction, metric and headline fit each other and the labels."""

import numpy as np
import pytest
import torch

from mmdiff_cache.datasets.registry import DATASETS
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.records import LabelSpec
from mmdiff_cache.tasks import TASKS, Task, better, find_task, headline, out_channels
from tests.learnable import LABELS, SCENES_LABELS

SPECS = {
    "blocks": {spec.name: spec for spec in LABELS},
    "scenes": {spec.name: spec for spec in SCENES_LABELS},
}


def drawn(task: Task, spec: LabelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [2 out 6 7] and a target [2 6 7] whose first row is not to be counted."""
    torch.manual_seed(0)
    outputs = torch.randn(2, out_channels(spec), 6, 7)
    outputs = outputs.exp() if task.output == "depth" else outputs
    if spec.kind == "depth":
        target = torch.rand(2, 6, 7) * 10 + 1
        target[:, 0] = 0.0
    else:
        target = torch.randint(0, max(len(spec.classes), 2), (2, 6, 7))
        target[:, 0] = 255
    return outputs.requires_grad_(), target


@pytest.mark.parametrize("data_set", SPECS)
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_loss_counts_the_known_pixels_alone(task: Task, data_set: str) -> None:
    spec = SPECS[data_set][task.label]
    outputs, target = drawn(task, spec)
    loss = task.loss(outputs, target, spec)
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad is not None
    assert (outputs.grad[:, :, 0] == 0).all()
    assert (outputs.grad[:, :, 1:] != 0).any()


@pytest.mark.parametrize("data_set", SPECS)
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_prediction_metric_and_headline_fit(task: Task, data_set: str) -> None:
    spec = SPECS[data_set][task.label]
    outputs, target = drawn(task, spec)
    metric = task.metric(spec, data_set)
    for output, truth in zip(outputs.detach(), target.numpy(), strict=True):
        prediction = task.predict(output)
        assert prediction.shape == (6, 7)
        metric.update(prediction, truth)
    scores = metric.scores()
    assert isinstance(scores[headline(task, data_set)], float)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_perfect_prediction_gets_the_best_headline(task: Task) -> None:
    spec = SPECS["scenes"][task.label]
    _, target = drawn(task, spec)
    truth = target[0].numpy()
    perfect = (truth == 1).astype(np.float32) if spec.kind == "mask" else truth
    guess = np.roll(perfect, 1, axis=1)
    values = []
    for prediction in (perfect, guess):
        metric = task.metric(spec, "scenes")
        metric.update(prediction, truth)
        values.append(metric.scores()[headline(task, "scenes")])
    assert values[0] == pytest.approx(1.0 if task.higher_is_better else 0.0, abs=1e-6)
    assert better(task, values[0], values[1])
    assert not better(task, values[1], values[0])
    assert better(task, values[1], None)


def test_the_headline_of_scenes_leaves_out_sky_and_ground() -> None:
    task, spec = TASKS["segmentation"], SPECS["scenes"]["segmentation"]
    metric = task.metric(spec, "scenes")
    truth = np.repeat(np.arange(8), 4).reshape(8, 4)
    metric.update(np.where(truth >= 2, 2, truth), truth)
    scores = metric.scores()
    assert headline(task, "scenes") == "miou_shapes"
    assert scores["miou_shapes"] == pytest.approx((4 / 24) / 6)
    assert scores["iou"]["sky"] == scores["iou"]["ground"] == 1.0
    assert headline(task, "voc") == "miou"


def test_default_vocabularies_are_those_that_scenes_stores() -> None:
    stored = DATASETS["scenes"].concepts
    assert {task.vocabulary for task in TASKS.values()} <= set(stored)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="task 'normals' is not known; there are segmentation, material, saliency, depth"
    ):
        find_task("normals")


def test_depth_without_a_range_is_refused() -> None:
    spec = LabelSpec(name="depth", kind="depth")
    with pytest.raises(ConfigError, match="no valid range"):
        TASKS["depth"].metric(spec, "blocks")
