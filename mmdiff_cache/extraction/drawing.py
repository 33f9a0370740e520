"""What is chosen about drawing pictures: defaults, what excludes what, what is said of it. No torch.

`generation` does the drawing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.config import ExtractConfig, GenerationConfig, NoiseConfig, filled
from mmdiff_cache.datasets.registry import DatasetEntry
from mmdiff_cache.errors import BackboneError, ConfigError

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def resolve_generation(
    config: ExtractConfig, entry: DatasetEntry, info: BackboneInfo, guidance: float | None
) -> GenerationConfig | None:
    """Fill every None with the default of the backbone; None for pictures that are not drawn.

    `guidance` is that of the captured passes. Raises ConfigError for choices that exclude each other.
    """
    if not entry.drawn:
        if config.generation is not None:
            raise ConfigError(
                f"{config.dataset} has pictures of its own; generation is for the data set 'prompts': leave "
                "out --mode and generation"
            )
        return None
    if config.data_root is not None:
        raise ConfigError(f"data set 'prompts' has no folder; leave out --data-root {config.data_root}")
    chosen = config.generation or GenerationConfig()
    resolved = replace(
        chosen,
        steps=chosen.steps or info.steps,
        guidance=guidance if chosen.guidance is None else chosen.guidance,
        true_cfg_scale=chosen.true_cfg_scale or info.true_cfg_scale,
    )
    if resolved.contrasts:
        resolved = replace(resolved, negative_prompt=chosen.negative_prompt or "")
    _check(config, resolved, info, guidance)
    return resolved


def _check(
    config: ExtractConfig, generation: GenerationConfig, info: BackboneInfo, guidance: float | None
) -> None:
    if generation.guidance is not None and info.guidance is None:
        raise ConfigError(
            f"{info.name} takes no guidance scale; leave out generation.guidance, "
            "or take generation.true_cfg_scale"
        )
    if generation.negative_prompt and not generation.contrasts:
        raise ConfigError(
            f"a negative prompt needs generation.true_cfg_scale above 1, got {generation.true_cfg_scale:g}"
        )
    if generation.mode == "renoise":
        return
    if generation.guidance != guidance:
        raise ConfigError(
            f"mode {generation.mode} captures the drawing itself, so generation.guidance "
            f"({generation.guidance}) must be guidance ({guidance}); leave one out"
        )
    if config.noise != NoiseConfig():
        raise ConfigError(
            f"mode {generation.mode} noises nothing, so leave out 'noise'; the noise that pictures are drawn "
            "from has generation.seed"
        )


def generation_identity(config: GenerationConfig, folder: Path) -> dict[str, Any]:
    """What decides pictures and captured passes, beside the prompts and seeds of the samples themselves.

    `folder` is the backbone's: its scheduler makes the schedule, from the number of steps and the resolution.
    """
    known: dict[str, Any] = {
        "mode": config.mode,
        "steps": config.steps,
        "scheduler": _scheduler(folder),
        "guidance": config.guidance,
        "true_cfg_scale": config.true_cfg_scale,
    }
    return known | ({"negative_prompt": config.negative_prompt} if config.contrasts else {})


def _scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration, without the version of the library that wrote it."""
    file = folder / SCHEDULER_CONFIG
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{file} cannot be read ({error}); pictures are drawn with this schedule"
        ) from error
    return {name: value for name, value in values.items() if name != "_diffusers_version"}


def describe_generation(config: GenerationConfig) -> str:
    """One line for the plan."""
    captured = {
        "trajectory": "captured while drawing, at timesteps inserted into the schedule: "
        "pictures differ from those of the plain schedule",
        "nearest": "captured while drawing, at the nearest steps of the schedule",
        "renoise": "captured afterwards, from the noised final latent",
    }[config.mode]
    guidance = "" if config.guidance is None else f", guidance {config.guidance:g}"
    contrast = f", true CFG {filled(config.true_cfg_scale):g}" if config.contrasts else ""
    return f"{config.mode}, {config.steps} steps{guidance}{contrast}; {captured}"
