"""Where the time of an extraction goes, part by part."""

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

Part = Literal[
    "reading",
    "text",
    "VAE",
    "transformer",
    "encoders",
    "cast and audit",
    "copy to host",
    "staging",
    "waiting",
]
PARTS: dict[Part, str] = {
    "reading": "pictures read and prepared, in a thread of its own",
    "text": "prompts encoded, or read from the pass before",
    "VAE": "pictures to latents, or latents to pictures that were drawn",
    "transformer": "forward passes with taps and concept streams",
    "encoders": "discriminative features, where any are wanted",
    "cast and audit": "clamped to float16, range audit, concept maps",
    "copy to host": "to the CPU's memory; on a GPU beside the next batch",
    "staging": "compressed and written, in a thread of its own",
    "waiting": "the model waits for a picture to be read or a batch to be staged",
}


class Profile:
    """Seconds by part, added up from any thread. One that is off costs nothing.

    On a GPU a part is timed by events in its stream, for calls return before their work is done.
    """

    def __init__(self, *, on: bool = True) -> None:
        self.on = on
        self.wall = 0.0
        """Seconds from the first sample to the last, after loading; of all workers together."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[Part, float]:
        """Seconds by part; on a GPU this waits for what is under way."""
        with self._lock:
            for part, begun, ended in self._events:
                ended.synchronize()
                self._seconds[part] += begun.elapsed_time(ended) / 1e3
            self._events.clear()
            return dict(self._seconds)

    def take(self) -> dict[Part, float]:
        """Seconds by part since the last call."""
        seconds = self.seconds
        self.add({part: -value for part, value in seconds.items()})
        return seconds

    def add(self, seconds: Mapping[Part, float]) -> None:
        """Count what another process took."""
        with self._lock:
            for part, value in seconds.items():
                self._seconds[part] += value

    @contextmanager
    def timing(self, part: Part, device: torch.device | None = None) -> Generator[None]:
        """Add the time of this block to a part; `device` is where its work is done, the CPU by default."""
        if not self.on:
            yield
        elif device is not None and device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record(torch.cuda.current_stream(device))
            yield
            ended.record(torch.cuda.current_stream(device))
            with self._lock:
                self._events.append((part, begun, ended))
        else:
            start = time.perf_counter()
            yield
            with self._lock:
                self._seconds[part] += time.perf_counter() - start

    @contextmanager
    def timing_all(self) -> Generator[None]:
        """Add the time of this block to the wall time."""
        start = time.perf_counter()
        yield
        self.wall += time.perf_counter() - start

    def __str__(self) -> str:
        """A table; parts in threads overlap with the others, so shares may add up to more than the whole."""
        rows = [f"{'part':<14} {'seconds':>9}  {'of wall':>7}"]
        for part, seconds in self.seconds.items():
            share = seconds / self.wall if self.wall else 0.0
            rows.append(f"{part:<14} {seconds:>9.2f}  {share:>7.1%}  {PARTS[part]}")
        rows.append(f"{'wall':<14} {self.wall:>9.2f}           after loading; parts in threads overlap")
        return "\n".join(rows)
