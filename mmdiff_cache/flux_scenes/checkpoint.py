"""Training state on disk, so that a killed run goes on as if nothing had happened.

A checkpoint is a folder: `weights.safetensors`, `optimisers.pt` and `state.json` (step, time, random state);
written beside the last one, it takes that one's place by a rename.
"""

import json
import logging
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mmdiff_cache.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Progress:
    """Everything that changes while training. `generator` is the only source of chance."""

    modules: dict[str, nn.Module]
    optimisers: list[Optimizer]
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0  # of computing, over all sittings

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in `folder`."""
        fresh = folder.with_name(folder.name + ".part")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(self._tensors(), fresh / "weights.safetensors")
        torch.save([one.state_dict() for one in self.optimisers], fresh / "optimisers.pt")
        random = self.generator.get_state().numpy().tobytes().hex()
        state = {"step": self.step, "seconds": self.seconds, "generator": random}
        (fresh / "state.json").write_text(json.dumps(state) + "\n")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        log.info("checkpoint at step %d: %s", self.step, folder)

    def load(self, folder: Path) -> bool:
        """Take over the checkpoint in `folder`; False if there is none. CheckpointError if it misfits."""
        if not folder.exists() and folder.with_name(folder.name + ".old").exists():
            folder = folder.with_name(folder.name + ".old")  # killed between the two renames
        if not folder.exists():
            return False
        tensors = load_file(folder / "weights.safetensors")
        try:
            for name, module in self.modules.items():
                prefix = name + "/"
                own = {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                module.load_state_dict(own)
            for optimiser, state in zip(
                self.optimisers, torch.load(folder / "optimisers.pt", weights_only=True), strict=True
            ):
                optimiser.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            message = f"checkpoint {folder} was made with other choices; use an empty --work folder ({error})"
            raise CheckpointError(message) from error
        state = json.loads((folder / "state.json").read_text())
        self.step, self.seconds = state["step"], state["seconds"]
        random = torch.frombuffer(bytearray.fromhex(state["generator"]), dtype=torch.uint8)
        self.generator.set_state(random)
        return True

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value.detach().clone().contiguous()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }


@dataclass
class Stop:
    """Set by SIGINT and SIGTERM while it is entered: the loop ends after the current step and saves."""

    asked: bool = False
    _before: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        log.info("signal %d: saving after this step", number)
        self.asked = True
