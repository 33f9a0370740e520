"""Claims put to the test: the paired differences of every seed, and the verdict that they give together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff_cache.errors import MMDiffError
from mmdiff_cache.experiments.outcome import Outcome, score_name
from mmdiff_cache.experiments.statistics import DRAWS, Difference, Verdict, paired_difference, verdict
from mmdiff_cache.experiments.table import LOWER_IS_BETTER, Claim


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What the test pictures say of a claim."""

    claim: Claim
    differences: Mapping[int, Difference]
    """By seed; positive where the claim holds."""
    verdict: Verdict
    paper: float | None
    """What the paper's figures give; None where it has none."""
    reason: str | None
    """Why it was not tested, or not in every seed; it is open then."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "better": self.claim.better,
            "worse": self.claim.worse,
            "task": self.claim.task,
            "metric": self.claim.metric,
            "source": self.claim.source,
            "claim": str(self.claim),
            "rows": list(self.claim.rows),
            "verdict": self.verdict,
            "paper": self.paper,
            "reason": self.reason,
            "differences": {
                str(seed): {"estimate": one.estimate, "low": one.low, "high": one.high}
                for seed, one in self.differences.items()
            },
        }


SEEDS = 3
"""Fewer leave every claim open."""


def judge(claim: Claim, outcomes: Sequence[Outcome], draws: int = DRAWS) -> Judgement:
    """Compare the rows of a claim seed by seed; a seed that one of them lacks leaves the claim open."""
    on_task = {one.row: one for one in outcomes if one.task == claim.task}
    rows = [on_task[name] for name in claim.rows]
    better, worse = rows[:2]
    found: dict[int, Difference] = {}
    reasons = [row.reason for row in rows if row.reason is not None]
    for seed in sorted({seed for row in rows for seed in row.runs}):
        if not all(seed in row.runs for row in rows):
            reasons.append(f"only {'one' if len(rows) == 2 else 'some'} of the rows has seed {seed}")
            continue
        name = score_name(claim.metric, claim.task, better.dataset)
        one, other, *beyond = (row.runs[seed] for row in rows)
        try:
            found[seed] = paired_difference(
                one,
                other,
                claim.task,
                name,
                draws,
                beyond=(beyond[0], beyond[1]) if beyond else None,
                split=better.split or "test",
            )
        except MMDiffError as error:
            reasons.append(str(error).splitlines()[0])
    if len(found) < SEEDS and not reasons:
        reasons.append(f"a verdict takes {SEEDS} seeds, there are {len(found)}")
    return Judgement(
        claim=claim,
        differences=found,
        verdict="open" if reasons else verdict(list(found.values())),
        paper=None if claim.beyond else _paper_gain(claim, better, worse),
        reason=reasons[0] if reasons else None,
    )


def _paper_gain(claim: Claim, better: Outcome, worse: Outcome) -> float | None:
    """By how much the paper's rows differ, positive where the claim holds."""
    pair = [row.paper.get(claim.metric) for row in (better, worse)]
    if pair[0] is None or pair[1] is None:
        return None
    return (pair[1] - pair[0]) if claim.metric in LOWER_IS_BETTER else (pair[0] - pair[1])
