"""The threads that compress and decompress: one pool a process, whoever asks for it.

Blosc, crc32c and file reads release the interpreter's lock, so threads are enough. A forked process gets a
pool of its own: threads do not survive a fork.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

MOST = 8


def codec_threads() -> int:
    """How many threads the pool has: while one of two on a core waits for the disk, the other decodes."""
    return min(MOST, 2 * (os.cpu_count() or 1))


def codec_pool() -> ThreadPoolExecutor:
    """The pool of this process. Tasks in it must not wait for other tasks in it."""
    return _pool(os.getpid())


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(codec_threads(), f"mmdiff-codec-{process}")
