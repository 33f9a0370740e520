"""What a recipe may say: rows, claims and figures that do not fit are refused before anything runs."""

import pytest

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments import Claim, Row, Table, Training
from mmdiff_cache.experiments.table import METRICS, claims, figures, group_reasons


def train(task: str) -> Training:
    datasets = tuple("scenes" for _ in task.split("+"))
    return Training(config=TrainConfig(task=task), datasets=datasets, backbone="flux-scenes")


def row(name: str, *tasks: str) -> Row:
    return Row(name=name, trainings=tuple(map(train, tasks)), paper={})


def claim(better: str, worse: str, task: str = "depth", metric: str = "abs_rel") -> Claim:
    return Claim(better=better, worse=worse, task=task, metric=metric, source="Sec. 0")


def test_a_row_answers_a_task_once() -> None:
    both = row("both", "segmentation+depth", "saliency")
    assert both.training("depth") is both.trainings[0]
    assert both.training("material") is None
    with pytest.raises(ConfigError, match="answers depth twice"):
        row("twice", "depth", "segmentation+depth")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (claim("a", "c"), "row 'c', but there are a, b"),
        (claim("a", "b", "segmentation", "miou"), "segmentation, which row 'a' does not train"),
        (claim("a", "b", "depth", "mae"), "needs one of abs_rel, rmse"),
    ],
)
def test_a_claim_is_about_what_the_table_has(wrong: Claim, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Table(title="t", rows=(row("a", "depth"), row("b", "depth")), claims=(wrong,))


def test_a_part_of_a_table_keeps_the_claims_between_its_rows() -> None:
    rows = (row("one t", "depth"), row("four t", "depth"), row("latent", "depth"))
    whole = Table(title="t", rows=rows, claims=(claim("four t", "one t"), claim("four t", "latent")))
    part = whole.only(["four", "one"])
    assert [one.name for one in part.rows] == ["one t", "four t"]
    assert part.claims == (claim("four t", "one t"),)
    with pytest.raises(ConfigError, match="no row has 'five' in its name; there are one t, four t"):
        whole.only(["five"])


def test_a_row_is_called_by_its_whole_name_without_those_that_contain_it() -> None:
    rows = (row("four t", "depth"), row("four t, equal weights", "depth"), row("latent", "depth"))
    whole = Table(title="t", rows=rows, claims=())
    assert [one.name for one in whole.only(["four t"]).rows] == ["four t"]
    assert [one.name for one in whole.only(["four"]).rows] == ["four t", "four t, equal weights"]


def test_figures_are_in_the_papers_order() -> None:
    found = figures(0.7890, 0.918, 0.929, 0.020, 0.118, 0.370, 0.951, 0.976, 0.983)
    assert found["segmentation"] == {"miou": 0.7890}
    assert found["saliency"]["mae"] == 0.020
    assert found["depth"]["delta3"] == 0.983


def test_a_claim_for_all_tasks_goes_by_the_first_metric() -> None:
    assert {(one.task, one.metric) for one in claims("a", "b", "ours")} == {
        (task, metrics[0]) for task, metrics in METRICS.items()
    }


def test_reasons_are_told_once() -> None:
    reasons = {("a", "depth"): "gone", ("b", "depth"): "gone", ("a", "saliency"): "gone", ("c", "depth"): "x"}
    assert group_reasons(reasons) == ["a (depth, saliency); b (depth): gone", "c (depth): x"]
