"""Packs what the trainings of a world's tables found, without their weights: hours of work in a few MB.

    python pipelines/keep_trainings.py runs/tables-scenes-flux-scenes --out trainings.tar.xz
    tar -xf trainings.tar.xz -C runs/tables-scenes-flux-scenes    # in the same place: `table` goes on from it

Of every scored training it keeps the configuration, losses, scores and what each test picture adds to
them, so that tables, curves and verdicts can be made again, or others tested, without training anything. A
checkpoint keeps its header alone: such a run can be compared, but it predicts nothing. Trainings are known by
their configuration, in which their stores stand by their full path. Those of saliency take most of the
room, for the F curve of each picture; `--only '*segmentation*'` packs a part.
"""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mmdiff_cache.sweeps.results import SCORES
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.checkpoint import BEST, LAST
from mmdiff_cache.training.folder import LOG

EVALUATION = "evaluation-*.json"
LEFT_OUT = (BEST, LOG)


def scored(trainings: Path, only: Sequence[str] = ()) -> list[Path]:
    """Folders of the trainings that were scored, by name; `only` are patterns for names, by default all."""
    folders = sorted(path.parent for path in trainings.glob(f"*/{LAST}"))
    if only:
        folders = [folder for folder in folders if any(fnmatchcase(folder.name, one) for one in only)]
    return [folder for folder in folders if (folder / SCORES).exists() or any(folder.glob(EVALUATION))]


def contents(run: Path) -> Iterator[tuple[str, bytes]]:
    """What is kept of a training: names within its folder, and bytes."""
    for path in sorted(run.iterdir()):
        if path.name == LAST:
            yield LAST, header_alone(path)
        elif path.is_file() and path.name not in LEFT_OUT and not path.name.startswith("."):
            yield path.name, path.read_bytes()


def header_alone(path: Path) -> bytes:
    """A checkpoint without any tensor."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / LAST
        checkpoint.save(bare, checkpoint.read_header(path), {})
        return bare.read_bytes()


def pack(tables: Path, out: Path, only: Sequence[str] = ()) -> int:
    """Write the archive, the same bytes for the same trainings; how many there are."""
    found = scored(tables / "trainings", only)
    with tarfile.open(out, "w:xz") as archive:
        for run in found:
            for name, content in contents(run):
                entry = tarfile.TarInfo(f"trainings/{run.name}/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return len(found)


def main() -> None:
    """Read the command line and pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", type=Path, help="folder of a world's tables")
    parser.add_argument("--out", type=Path, required=True, help="the archive, .tar.xz")
    parser.add_argument(
        "--only", action="append", default=[], help="pattern of names of trainings; may be repeated"
    )
    asked = parser.parse_args()
    count = pack(asked.tables, asked.out, asked.only)
    print(f"{count} trainings in {asked.out}, {asked.out.stat().st_size / 1e6:.1f} MB")  # noqa: T201


if __name__ == "__main__":
    main()
