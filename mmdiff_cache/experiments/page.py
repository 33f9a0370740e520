"""All claims of a world on one page, with the line that tests each again, from what its tables left."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.experiments.report import RESULTS, as_markdown, score_title
from mmdiff_cache.experiments.statistics import Difference, verdict
from mmdiff_cache.training import checkpoint

CLAIMS = "claims.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherClaim:
    """A claim that no row of a table stands for."""

    claim: str
    task: str
    """What it is tested on, before the name of the score."""
    metric: str
    differences: Sequence[Difference]
    """Positive where it holds; a line a run, or the only one."""
    runs: int = 1
    """How many it takes for a verdict."""


def write_claims(out: Path, title: str, command: str, tested: Sequence[OtherClaim]) -> None:
    """Leave claims in `out` as a table leaves its own, and write the page above again, if there is one."""
    claims = [
        {
            "claim": one.claim,
            "rows": [],
            "task": one.task,
            "metric": one.metric,
            "paper": None,
            "reason": f"a verdict takes {one.runs} seeds, there are {len(one.differences)}",
            "verdict": verdict(one.differences) if len(one.differences) >= one.runs else "open",
            "differences": {str(number): asdict(found) for number, found in enumerate(one.differences)},
        }
        for one in tested
    ]
    result = {"title": title, "command": command, "whole": True, "claims": claims}
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / RESULTS, result, "--out")
    if (out.parent / CLAIMS).exists():
        write_page(out.parent)


def write_page(folder: Path) -> Path:
    """Write the page into the folder of a world's tables. Parts of tables (`--row`, `--task`) do not count.

    Raises ConfigError for results that cannot be read, StorageError where the folder refuses.
    """
    tables = [values for file in sorted(folder.glob(f"*/{RESULTS}")) if (values := _read(file))["whole"]]
    verdicts = Counter(_verdict(claim) for values in tables for claim in values["claims"])
    parts = [
        "# Claims and verdicts",
        "A claim says that one row scores better on the test pictures than another. It was written into the "
        "recipe before the run. Confirmed: the 95 % interval of the paired bootstrap over test pictures lies "
        "above zero in every seed; refuted: below zero in every seed; else open. A gain is positive where "
        "the claim holds, whichever way the score runs; the paper's are on its own data.",
        "An interval holds what other test pictures would change. Seeds differ in initial weights and "
        "dropout, not in the pictures that are trained on or in their order; among so many claims a few "
        "verdicts are chance.",
        ", ".join(f"{count} {name}" for name, count in verdicts.most_common()) + ".",
        *(_section(values) for values in tables),
    ]
    checkpoint.write_bytes(folder / CLAIMS, ("\n\n".join(parts) + "\n").encode(), "--out")
    return folder / CLAIMS


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {key: values[key] for key in ("title", "command", "whole", "claims")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read as a table's results; run the table again") from error


def _verdict(claim: Mapping[str, Any]) -> str:
    return claim["verdict"] if claim["differences"] else "not run"


def _section(values: Mapping[str, Any]) -> str:
    """One table's claims."""
    lines: list[list[str]] = []
    for claim in values["claims"]:
        asked = [word for row in claim["rows"] for word in ("--row", row)]
        again = (
            f"{values['command']} {shlex.join([*asked, '--task', claim['task']])}"
            if asked
            else values["command"]
        )
        paper, gains = claim["paper"], claim["differences"].values()
        lines.append(
            [
                claim["claim"],
                f"{claim['task']} {score_title(claim['metric'])}",
                "-" if paper is None else f"{paper:+.3f}",
                "\n".join(str(Difference(**gain)) for gain in gains) or claim["reason"],
                f"**{_verdict(claim)}**",
                f"`{again}`",
            ]
        )
    titles = ["claim", "score", "paper", "gain by seed [95 % interval]", "verdict", "again"]
    return f"## {values['title']}\n\n    {values['command']}\n\n{as_markdown(titles, lines)}"
