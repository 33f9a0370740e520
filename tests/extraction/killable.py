"""A process that runs extractions in forks of itself and kills them on request. Started by test_kill.py.

Loading torch and diffusers takes ten seconds, so it is done once, before the forks. A fork counts its calls
of os.fsync and os.replace, writes each down, and may kill itself right before one of them. One JSON job a
line on standard input, one line on standard output when it has ended.
"""

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    from mmdiff_cache.backbones.registry import describe, load_backbone
    from mmdiff_cache.config import ExtractConfig
    from mmdiff_cache.extraction import run

    load_backbone(describe(sys.argv[1]))  # fills the libraries' caches, which the forks then share
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            watch(Path(job["config"]["store"]), Path(job["events"]), job["kill_at"], tear=job["tear"])
            run.extract(ExtractConfig.from_json(job["config"]))
            os._exit(int(bool({"dask", "distributed"} & set(sys.modules))))
        answers.write(f"{os.waitpid(child, 0)[1]}\n")
        answers.flush()


def watch(store: Path, events: Path, kill_at: int | None, *, tear: bool) -> None:
    """Write down every durable step of this process, and kill it right before step number `kill_at`.

    With `tear` the file that was about to be made durable is cut in half first: that is what is left of it
    when the power fails.
    """
    log = open(events, "w", buffering=1)  # noqa: SIM115 - it lives as long as the process
    lock, count = threading.Lock(), 0
    replace, fsync = os.replace, os.fsync

    def step(name: str, path: str) -> None:
        nonlocal count
        with lock:
            log.write(f"{name} {plain(path, store)}\n")
            if count == kill_at:
                if tear:
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def watched_replace(source: Any, target: Any, **options: Any) -> None:
        step("replace", os.fspath(target))
        replace(source, target, **options)

    def watched_fsync(descriptor: int) -> None:
        step("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.replace, os.fsync = watched_replace, watched_fsync


def plain(path: str, store: Path) -> str:
    """A path from the store's folder, without the process and the random part of staged names."""
    relative = os.path.relpath(path, store)
    return re.sub(r"^(staging/[a-z]+(-\d{6})?)-\d+-[0-9a-f]+", r"\1", relative)


if __name__ == "__main__":
    main()
