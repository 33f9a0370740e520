"""Claims of a table against the statistics that its runs left."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdiff_cache.experiments.judgement import judge
from mmdiff_cache.experiments.outcome import Outcome
from mmdiff_cache.experiments.table import Claim
from tests.experiments.test_statistics import DEPTH, kept

ROWS = ("four", "one")
CLAIM = Claim(better="four", worse="one", task="depth", metric="abs_rel", source="ours")


def outcomes(
    folder: Path, gains: tuple[float, ...], *, lacking: int = 0, reason: str | None = None
) -> list[Outcome]:
    """Two rows on eight pictures, the first with errors that are lower by these gains, a seed each."""
    runs: dict[str, dict[int, Path]] = {name: {} for name in ROWS}
    for seed, gain in enumerate(gains):
        errors = np.random.default_rng(seed).uniform(0.2, 0.3, 8)
        for name in ROWS[: 1 if seed >= len(gains) - lacking else 2]:
            values = np.zeros((8, 8))
            values[:, 0], values[:, 6] = errors - gain * (name == "four"), 1
            runs[name][seed] = kept(folder / f"{name}-{seed}", DEPTH, values)
    return [
        Outcome(
            row=name, task="depth", dataset="blocks", split="test", paper={}, runs=runs[name], scores={},
            parameters=None, curve=(), expected=True, reason=reason if name == "one" else None,
        )
        for name in ROWS
    ]  # fmt: skip


def test_a_gain_in_every_seed_confirms_and_a_loss_in_every_seed_refutes(tmp_path: Path) -> None:
    for name, gains, expected in (
        ("up", (0.05, 0.02, 0.03), "confirmed"),
        ("down", (-0.05, -0.02, -0.03), "refuted"),
        ("both", (0.05, -0.02, 0.03), "open"),
    ):
        (tmp_path / name).mkdir()
        found = judge(CLAIM, outcomes(tmp_path / name, gains), draws=100)
        assert found.verdict == expected
        assert found.reason is None
        assert [round(one.estimate, 9) for one in found.differences.values()] == list(gains)
        assert json.loads(json.dumps(found.to_json()))["differences"]["1"]["low"] == found.differences[1].low


def test_a_gain_larger_than_another(tmp_path: Path) -> None:
    """The pair on the right gains 0.02 in every seed: more than that holds, as much does not."""
    (tmp_path / "young").mkdir()
    young = [replace(one, row=f"young {one.row}") for one in outcomes(tmp_path / "young", (0.02, 0.02, 0.02))]
    claim = replace(CLAIM, beyond=("young four", "young one"))
    for name, gains, expected in (("more", (0.05, 0.03, 0.04), "confirmed"), ("less", (0.0,) * 3, "refuted")):
        (tmp_path / name).mkdir()
        found = judge(claim, [*outcomes(tmp_path / name, gains), *young], draws=100)
        assert found.verdict == expected
        assert found.differences[1].estimate == pytest.approx(gains[1] - 0.02)
        assert found.to_json()["rows"] == ["four", "one", "young four", "young one"]
    assert str(claim) == "four > one, by more than young four > young one (ours)"


def test_what_is_not_there_in_every_seed_stays_open(tmp_path: Path) -> None:
    found = judge(CLAIM, outcomes(tmp_path, (0.05, 0.05, 0.05, 0.05), lacking=1), draws=50)
    assert found.verdict == "open"
    assert found.reason == "only one of the rows has seed 3"
    assert list(found.differences) == [0, 1, 2]
    assert found.differences[0].low > 0


def test_a_row_that_was_not_run_says_why(tmp_path: Path) -> None:
    found = judge(CLAIM, outcomes(tmp_path, (), reason="no weights"), draws=50)
    assert (found.verdict, found.reason, found.differences) == ("open", "no weights", {})


def test_runs_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    made = outcomes(tmp_path, (0.05,))
    (tmp_path / "one-0" / "statistics-depth-test-ema.npz").unlink()
    found = judge(CLAIM, made, draws=50)
    assert found.verdict == "open"
    assert "has no statistics of depth" in (found.reason or "")


def test_two_seeds_are_no_verdict(tmp_path: Path) -> None:
    found = judge(CLAIM, outcomes(tmp_path, (0.05, 0.05)), draws=50)
    assert (found.verdict, found.reason) == ("open", "a verdict takes 3 seeds, there are 2")


def test_the_papers_gain_is_positive_where_the_claim_holds(tmp_path: Path) -> None:
    better, worse = outcomes(tmp_path, (0.05,))
    pair = [replace(better, paper={"abs_rel": 0.118}), replace(worse, paper={"abs_rel": 0.431})]
    assert judge(CLAIM, pair, draws=50).paper == pytest.approx(0.313)
    assert judge(CLAIM, [better, worse], draws=50).paper is None
