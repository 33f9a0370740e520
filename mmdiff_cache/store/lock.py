"""One writer at a time: an advisory lock that the kernel frees when its holder dies, however it dies."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from mmdiff_cache.errors import StoreError


class StoreLock:
    """The lock of a store, held from construction to `release`.

    The file's content only says who holds it; the lock itself is the kernel's (flock), so no stale lock can
    remain. Raises StoreError when another process, or another writer in this one, holds it.
    """

    def __init__(self, root: Path) -> None:
        self._descriptor: int | None = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 4096)
            self.release()
            raise StoreError(
                f"{root} is being written by {_holder(holder)}; wait for it or stop it"
            ) from None
        os.ftruncate(self._descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        os.write(self._descriptor, json.dumps(note).encode())

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _holder(note: bytes) -> str:
    try:
        values = json.loads(note)
        return f"process {values['pid']} on {values['host']}, since {values['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
