"""A process that trains in forks of itself, to be killed. Started by test_kill.py.

Loading torch takes seconds, so it is done once, before the forks. One JSON configuration a line on standard
input; the fork's process id comes back at once, on standard output, and its exit status when it has ended.
"""

import json
import os
import sys

from mmdiff_cache.config import TrainConfig
from mmdiff_cache.training.run import train


def main() -> None:
    """Serve configurations until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run = train(TrainConfig.from_json(json.loads(line)))
            os._exit(0 if run.finished else 1)
        answers.write(f"{child}\n")
        answers.write(f"{os.waitpid(child, 0)[1]}\n")


if __name__ == "__main__":
    main()
