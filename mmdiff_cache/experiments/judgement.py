"""Claims put to the test: the paired differences of every seed, and the verdict that they give together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff_cache.errors import MMDiffError
from mmdiff_cache.experiments.outcome import Outcome, score_name
from mmdiff_cache.experiments.statistics import DRAWS, Difference, Verdict, paired_difference, verdict
from mmdiff_cache.experiments.table import Claim


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What the test pictures say of a claim."""

    claim: Claim
    differences: Mapping[int, Difference]
    """By seed; positive where the claim holds."""
    verdict: Verdict
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
            "verdict": self.verdict,
            "reason": self.reason,
            "differences": {
                str(seed): {"estimate": one.estimate, "low": one.low, "high": one.high}
                for seed, one in self.differences.items()
            },
        }


def judge(claim: Claim, outcomes: Sequence[Outcome], draws: int = DRAWS) -> Judgement:
    """Compare both rows of a claim seed by seed; a seed that one of them lacks leaves the claim open."""
    on_task = {one.row: one for one in outcomes if one.task == claim.task}
    better, worse = on_task[claim.better], on_task[claim.worse]
    found: dict[int, Difference] = {}
    reasons = [row.reason for row in (better, worse) if row.reason is not None]
    for seed in sorted({*better.runs, *worse.runs}):
        if seed not in better.runs or seed not in worse.runs:
            reasons.append(f"only one of the rows has seed {seed}")
            continue
        name = score_name(claim.metric, claim.task, better.dataset)
        try:
            found[seed] = paired_difference(
                better.runs[seed], worse.runs[seed], claim.task, name, draws, split=better.split or "test"
            )
        except MMDiffError as error:
            reasons.append(str(error).splitlines()[0])
    if not found and not reasons:
        reasons.append("no seed of both rows was trained")
    return Judgement(
        claim=claim,
        differences=found,
        verdict="open" if reasons else verdict(list(found.values())),
        reason=reasons[0] if reasons else None,
    )
