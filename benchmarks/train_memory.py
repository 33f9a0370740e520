"""What a training step needs of a device's memory, computed by running it where tensors have no values.

    python benchmarks/train_memory.py [--batch 8] [--budget 24] [--confirm] [--out benchmarks/results/NAME.md]

The model, the loss, AdamW and the moving average are those of a training. They run on PyTorch's fake
tensors, which have shapes and no values, while every block of memory is counted from its making to its end.
`--confirm` runs the same code with values at small sizes, and compares what was counted with what PyTorch's
allocator says.

What is counted is what the operations of a CPU take. Those of a GPU keep less: dropout a byte for each value
instead of four. Not counted: the CUDA context and libraries (0.5 GB or so), workspaces inside kernels, and
the allocator's fragments; a tenth of the budget should stay free for them.
"""

import argparse
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rounds import publish
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmdiff_cache.config import AggregatorConfig, EmaConfig
from mmdiff_cache.losses import cross_entropy
from mmdiff_cache.models.mmdiff import MMDiff, ModelSpec
from mmdiff_cache.training.ema import Ema
from mmdiff_cache.training.optim import make_optimizer
from mmdiff_cache.training.scoring import autocast

PAPER = ModelSpec(
    decoder="deeplabv3plus",
    out_channels=21,
    layers=4,
    channels=3072,
    timesteps=4,
    cleanest=3,
    grid=(32, 32),
    patch=16,
    concepts=4,
    aggregator=AggregatorConfig(width=768),
)
"""FLUX.1-dev at 512 px on VOC with four concepts; DeepLabV3+ is the larger of the decoders (Sec. 3.4)."""
SMALL: Mapping[str, tuple[int, int, int]] = {
    "C 128, D 64, 16 x 16 tokens, batch 2": (128, 16, 2),
    "C 256, D 128, 16 x 16 tokens, batch 2": (256, 16, 2),
    "C 256, D 128, 16 x 16 tokens, batch 4": (256, 16, 4),
    "C 256, D 128, 32 x 32 tokens, batch 2": (256, 32, 2),
}
"""Where `--confirm` compares: channels, tokens a side, batch."""
GIGA = 1e9


class Ledger(TorchDispatchMode):
    """Counts the bytes of all memory that operations hand out, until nothing refers to it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, value: Tensor) -> None:
        memory = value.untyped_storage()
        key, size = id(memory), memory.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(memory, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bytes of one training step."""

    weights: int
    gradients: int
    optimiser: int
    """Both running averages of AdamW."""
    average: int
    """The moving average of the weights."""
    inputs: int
    """A batch: float16 hidden states, concept maps, labels."""
    saved: int
    """What the forward pass keeps for the backward pass, beside weights and inputs."""
    peak: int
    """The most at any moment, temporary values included."""


class Step:
    """Training steps of a model on one batch, in the order of a training's own."""

    def __init__(self, spec: ModelSpec, batch: int, precision: str) -> None:
        self.precision = precision
        with unset_fake_temporarily(), torch.device("meta"):  # fake tensors cannot be copied
            self.model = MMDiff.from_spec(spec).train()
            self.average = Ema(self.model, EmaConfig())
        _give_memory(self.model)
        _give_memory(self.average.model)
        self.optimiser = make_optimizer(self.model, learning_rate=1e-4, decoder_rate=0.5, weight_decay=0.01)
        rows, columns = spec.grid
        shape = (batch, spec.timesteps, spec.layers, rows, columns, spec.channels)
        self.hidden_states = torch.zeros(shape, dtype=torch.float16)
        self.concepts = torch.zeros(batch, spec.concepts, rows, columns)
        self.target = torch.zeros(batch, rows * spec.patch, columns * spec.patch, dtype=torch.int64)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a batch brings."""
        return self.hidden_states, self.concepts, self.target

    def loss(self) -> Tensor:
        """The forward pass."""
        with autocast(self.target.device, self.precision):
            logits = self.model(self.hidden_states, self.concepts)
        return cross_entropy(logits, self.target)

    def run(self) -> None:
        """Forward, backward, AdamW, moving average."""
        loss = self.loss()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.average.update(self.model)

    def saved(self) -> int:
        """Bytes that a forward pass keeps, each block of memory once."""
        own = {id(x.untyped_storage()) for x in (*self.model.parameters(), *self.inputs)}
        kept: dict[int, Any] = {}

        def keep(value: Tensor) -> Tensor:
            memory = value.untyped_storage()
            if id(memory) not in own:
                kept[id(memory)] = memory
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = self.loss()
        total = sum(memory.nbytes() for memory in kept.values())
        del loss
        return total


def budget(spec: ModelSpec, batch: int, *, precision: str = "float32", fake: bool = True) -> Budget:
    """Count a training step; without values, `fake`, any size takes seconds.

    Two steps are run: only in the second AdamW's averages are there from the beginning.
    """
    ledger = Ledger()
    with FakeTensorMode() if fake else nullcontext(), ledger:
        step = Step(spec, batch, precision)
        step.run()
        step.run()
        peak = ledger.peak
        saved = step.saved()
    weights = _bytes(step.model.parameters())
    moments = [x for state in step.optimiser.state.values() for x in state.values()]
    return Budget(
        weights=weights,
        gradients=_bytes(p.grad for p in step.model.parameters() if p.grad is not None),
        optimiser=_bytes(moments),
        average=_bytes(step.average.model.parameters()),
        inputs=_bytes(step.inputs),
        saved=saved,
        peak=peak,
    )


def measured_peak(spec: ModelSpec, batch: int, *, precision: str = "float32") -> int:
    """Run the same steps with values; what they held at most, by the events of PyTorch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step = Step(spec, batch, precision)
        step.run()
        step.run()
    events = cast(Any, seen.profiler).kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for change in changes:
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def _give_memory(model: nn.Module) -> None:
    """Zeros for parameters that have a shape alone."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.zeros(parameter.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def small_spec(channels: int, grid: int, *, checkpointing: bool = False) -> ModelSpec:
    """The paper's model with fewer channels and tokens."""
    aggregator = AggregatorConfig(width=channels // 2, checkpointing=checkpointing)
    return dataclasses.replace(PAPER, channels=channels, grid=(grid, grid), patch=8, aggregator=aggregator)


def settings() -> dict[str, tuple[ModelSpec, str]]:
    """The ways to train the paper's model that a budget is given for."""
    frugal = dataclasses.replace(PAPER, aggregator=dataclasses.replace(PAPER.aggregator, checkpointing=True))
    return {
        "float32": (PAPER, "float32"),
        "bfloat16": (PAPER, "bfloat16"),
        "float32, checkpointing": (frugal, "float32"),
        "bfloat16, checkpointing": (frugal, "bfloat16"),
    }


def paper_table(batch: int, limit: float) -> list[str]:
    """The paper's model with each setting, part by part in GB, and whether it fits with a tenth to spare."""
    parts = [field.name for field in dataclasses.fields(Budget)]
    lines = [
        f"**C = 3072, D = 768, 32 x 32 tokens, 4 x 4 maps, DeepLabV3+, batch {batch}: GB (1e9 bytes)**",
        "",
        f"| | {' | '.join(parts)} | fits {limit:g} GB |",
        f"|---{'|---' * len(parts)}|---|",
    ]
    for name, (spec, precision) in settings().items():
        found = budget(spec, batch, precision=precision)
        values = " | ".join(f"{getattr(found, part) / GIGA:.2f}" for part in parts)
        lines.append(f"| {name} | {values} | {'yes' if found.peak <= 0.9 * limit * GIGA else 'no'} |")
    return [*lines, "", "`saved` is part of `peak`; it fits if a tenth of the budget stays free.", ""]


def confirmation_table() -> list[str]:
    """At small sizes: what the allocator of a CPU says, and what was counted with values and without."""
    lines = [
        "**Counted against the allocator of a CPU: MB (1e6 bytes), ratio to what the allocator says**",
        "",
        "| | allocator | counted with values | counted without |",
        "|---|---|---|---|",
    ]
    for name, (channels, grid, batch) in SMALL.items():
        for precision in ("float32", "bfloat16"):
            for checkpointing in (False, True):
                spec = small_spec(channels, grid, checkpointing=checkpointing)
                truth = measured_peak(spec, batch, precision=precision)
                here = budget(spec, batch, precision=precision, fake=False).peak
                fake = budget(spec, batch, precision=precision).peak
                row = f"{name}, {precision}{', checkpointing' if checkpointing else ''}"
                lines.append(
                    f"| {row} | {truth / 1e6:,.0f} | {here / 1e6:,.0f} ({here / truth:.2f}) "
                    f"| {fake / 1e6:,.0f} ({fake / truth:.2f}) |"
                )
    return [*lines, ""]


def main() -> None:
    """Read the command line, count, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=float, default=24.0, help="GB of the device")
    parser.add_argument(
        "--confirm", action="store_true", help="compare with a CPU's allocator at small sizes"
    )
    parser.add_argument("--out", type=Path, help="also write the tables here")
    asked = parser.parse_args()
    lines = [
        f"# Memory of a training step, {time.strftime('%Y-%m-%d')}",
        "",
        f"torch {torch.__version__}.",
        "",
    ]
    lines += paper_table(asked.batch, asked.budget)
    lines += confirmation_table() if asked.confirm else []
    publish(lines, asked.out)


if __name__ == "__main__":
    main()
