"""What a run of stage one costs: counted operations, and time as far as the machine's speed is known."""

from dataclasses import dataclass, replace

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.config import ExtractConfig, filled
from mmdiff_cache.extraction.measured import Figure, known_speed, machine_of

TIMED = "timed: two of its blocks with random weights; VAE, concepts, encoders and disk come on top"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """An estimate that says where it is from; while a run goes on, its measured speed takes over."""

    operations: float
    """Floating-point operations of all forward passes of the transformer."""
    machine: str
    """A GPU's name, or `cpu, 2 threads`."""
    speed: Figure | None
    """Operations a second; None where nothing was measured."""
    activation_bytes: int | None = None
    """GPU memory of a pass beside the weights, where blocks were timed on a GPU."""
    gpus: int = 1
    """GPUs among which the samples are divided; processes on the CPU share its cores, and do not count."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if self.machine.startswith("cpu") else "cuda"

    @property
    def seconds(self) -> float | None:
        """Estimated duration; None where nothing was measured."""
        return None if self.speed is None else self.operations / self.speed.value / self.gpus

    def __str__(self) -> str:
        total = show_operations(self.operations)
        if self.speed is None or self.seconds is None:
            return f"unknown ({total}; no run on this machine was measured yet; --dry-run times two blocks)"
        speed = f"{show_operations(self.speed.value)}/s{f' on each of {self.gpus} GPUs' * (self.gpus > 1)}"
        return f"about {show_duration(self.seconds)} ({total} at {speed}; {self.speed.source})"


def estimate(config: ExtractConfig, info: BackboneInfo, *, samples: int) -> Cost:
    """The cost of a resolved configuration for so many samples: transformer alone (forward_operations)."""
    machine = machine_of(config.device)
    return Cost(
        operations=operations_a_sample(config, info) * samples,
        machine=machine,
        speed=known_speed(config, machine),
    )


def operations_a_sample(config: ExtractConfig, info: BackboneInfo) -> float:
    """Floating-point operations of the transformer for one sample, all its variants and timesteps."""
    return _passes(config) * _operations_a_pass(config, info, _blocks_run(config, info))


def time_blocks(cost: Cost, config: ExtractConfig, info: BackboneInfo) -> Cost:
    """The same cost with the speed of two blocks, timed now with random weights; takes seconds."""
    from mmdiff_cache.backbones import timing

    taken = timing.time_blocks(
        info,
        resolution=filled(config.resolution),
        text_length=filled(config.text_length),
        batch=filled(config.batch_size) * len(filled(config.timesteps)),
        device=config.device,
        dtype=filled(config.dtype),
    )
    speed = Figure(value=_operations_a_pass(config, info, 1) / taken.seconds, source=TIMED)
    return replace(cost, speed=speed, activation_bytes=taken.activation_bytes)


def _passes(config: ExtractConfig) -> int:
    """Passes of the transformer a sample: its timesteps, and the steps in which it is drawn."""
    timesteps, generation = len(filled(config.timesteps)), config.generation
    if generation is None:
        return timesteps * config.draws * (2 if config.flip else 1)
    contrast = 2 if generation.contrasts else 1
    return {
        "renoise": filled(generation.steps) * contrast + timesteps,
        "trajectory": (filled(generation.steps) + timesteps) * contrast,
        "nearest": filled(generation.steps) * contrast,
    }[generation.mode]


def forward_operations(info: BackboneInfo, resolution: int, text_length: int, blocks: int) -> float:
    """Floating-point operations of one forward pass through so many blocks.

    A block costs 24 C^2 S + 4 S^2 C for S tokens of text and image, double and single blocks alike; the
    concept stream, the VAE and all encoders are left out.
    """
    rows, columns = info.token_grid(resolution)
    tokens, width = rows * columns + info.architecture.clip_tokens + text_length, info.channels
    return blocks * (24 * width**2 * tokens + 4 * tokens**2 * width)


def _operations_a_pass(config: ExtractConfig, info: BackboneInfo, blocks: int) -> float:
    return forward_operations(info, filled(config.resolution), filled(config.text_length), blocks)


def _blocks_run(config: ExtractConfig, info: BackboneInfo) -> int:
    if config.generation is not None:
        return len(info.blocks)
    deepest = 1 + max(info.blocks.index(layer) for layer in filled(config.layers))
    return max(deepest, len(info.double_blocks)) if config.concepts else deepest


def show_duration(seconds: float) -> str:
    """Seconds in the unit a person would use: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def show_operations(count: float) -> str:
    """A count in the unit a person would use: 40 GFLOP, 29.4 TFLOP."""
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if count < 1e12 or unit == "PFLOP":
            return f"{count / 1e9:,.3g} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")
