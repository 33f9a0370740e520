"""Do the aggregator's weights lean to cleaner timesteps at edges? Runs of several seeds, against labels.

    python pipelines/fusion_weights.py RUN RUN RUN --out fusion-weights     # a run a seed; seconds each
    python pipelines/fusion_weights.py --table runs/tables-scenes-flux-scenes/table-timesteps/results.json \\
        --row "four timesteps" --task segmentation --out fusion-weights     # the runs of a table's row

Claims, fixed before any run, on the mean over layers: the mean t of a token, sum over T of w_t t, is smaller
at edges than inside (Sec. 3.1: boundaries need the precision of late timesteps), and by more than at the
edges of other pictures; confirmed where the 95 % interval of the paired bootstrap over pictures lies on that
side in every seed. Writes table.md, scores.json, plot.png, results.json (for the page of a world's
claims, beside whose tables `--out` may lie), and examples.png of the first run.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from mmdiff_cache.errors import ConfigError, MMDiffError
from mmdiff_cache.experiments.fusion_report import (
    check_alike,
    claims,
    draw,
    example_sheet,
    markdown,
    verdict_words,
)
from mmdiff_cache.experiments.fusion_weights import FusionWeights, fusion_weights, open_weighed
from mmdiff_cache.experiments.judgement import SEEDS
from mmdiff_cache.experiments.page import OtherClaim, write_claims
from mmdiff_cache.visuals.panels import draw_sheet, save_png

EXAMPLES = 6


def runs_of(table: Path, row: str, task: str) -> list[Path]:
    """The folders of a row's trainings for a task, from a table's results. Raises ConfigError."""
    try:
        outcomes = json.loads(table.read_text(encoding="utf-8"))["outcomes"]
        found = {(one["row"], one["task"]): list(one["runs"].values()) for one in outcomes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{table} cannot be read as a table's results; run the table first") from error
    if not found.get((row, task)):
        known = ", ".join(f"{name!r} ({one})" for (name, one), runs in found.items() if runs)
        raise ConfigError(f"{table} has no trainings of row {row!r} for {task}; it has {known or 'none'}")
    return [Path(run) for run in found[row, task]]


def measure(
    runs: list[Path], out: Path, split: str | None, store: Path | None, task: str | None
) -> list[FusionWeights]:
    """Measure every run, and write all files."""
    out.mkdir(parents=True, exist_ok=True)
    found: list[FusionWeights] = []
    for run in runs:
        weighed = open_weighed(run, split, store=store, task=task)
        found.append(fusion_weights(weighed))
        check_alike(found)
        if len(found) == 1:
            save_png(draw_sheet(example_sheet(weighed, EXAMPLES)), out / "examples.png")
    scores = {
        "runs": [one.to_json() for one in found],
        "claims": {claim: verdict_words(gains) for claim, gains in claims(found).items()},
    }
    (out / "scores.json").write_text(json.dumps(scores))
    (out / "table.md").write_text(markdown(found))
    draw(found, out / "plot.png")
    write_claims(
        out,
        f"Fusion weights at edges and inside, {found[0].task}",
        shlex.join(["python", *sys.argv]),
        [
            OtherClaim(claim=claim, task=found[0].task, metric="mean t", differences=gains, runs=SEEDS)
            for claim, gains in claims(found).items()
        ],
    )
    return found


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="a trained run; one a seed")
    parser.add_argument("--table", type=Path, help="results.json of a table, in place of runs")
    parser.add_argument("--row", help="row of the table")
    parser.add_argument("--task", help="task of the row, or of runs of several")
    parser.add_argument("--split", help="by default the one that evaluate takes")
    parser.add_argument("--store", type=Path, help="where the runs' store lies now")
    parser.add_argument("--out", type=Path, default=Path("fusion-weights"), help="folder of the results")
    asked = parser.parse_args()
    if bool(asked.runs) == bool(asked.table) or (asked.table and not (asked.row and asked.task)):
        parser.error("give runs, or --table with --row and --task")
    try:
        runs = asked.runs or runs_of(asked.table, asked.row, asked.task)
        print(markdown(measure(runs, asked.out, asked.split, asked.store, asked.task)))  # noqa: T201
    except MMDiffError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
