"""Stage one against the bare model: images a second of extraction over those of a VAE and transformer loop.

    python benchmarks/bench_extract.py [--samples 32] [--rounds 7] [--out benchmarks/results/NAME.md]
    python benchmarks/bench_extract.py --random-flux --device cuda --samples 64    # 12 B, 512 px

The bare loop encodes, noises and runs the same blocks on the same batches, with the text done beforehand,
and keeps nothing. Extraction also reads PNG files, taps, casts, audits, compresses and writes durably. All
ways run in one process, interleaved, on an otherwise idle machine. Operations are counted, not measured.
"""

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_flux import random_flux
from rounds import interleaved, publish, ratios

import mmdiff_cache as mm
from mmdiff_cache.backbones.base import Backbone
from mmdiff_cache.backbones.flow_matching import add_noise, draw_batch
from mmdiff_cache.backbones.info import BackboneInfo
from mmdiff_cache.config import ExtractConfig
from mmdiff_cache.extraction.cost import operations_a_sample, show_operations
from mmdiff_cache.extraction.extractor import Extractor
from mmdiff_cache.extraction.plan import ExtractionPlan
from mmdiff_cache.extraction.run import load_extractor
from mmdiff_cache.extraction.variants import variants_of
from mmdiff_cache.extraction.worker import load_batch, run_partition
from mmdiff_cache.records import PreparedSample
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.writer import open_writer

BARE, UNSTORED, PLAIN, WHOLE = (
    "VAE and transformer alone (the bound)",
    "extraction without reading and writing",
    "extraction without concept maps",
    "extraction, four concept vocabularies",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured: a plan, and the extractor that carries it out."""

    plan: ExtractionPlan
    extractor: Extractor
    samples: Sequence[PreparedSample]


def pictures(folder: Path, count: int) -> Path:
    """Rendered scenes as PNG files, so that drawing them is not part of what is measured."""
    folder.mkdir()
    scenes = mm.plan(ExtractConfig(limit=count, splits=("train",))).dataset
    for number in range(count):
        Image.fromarray(scenes.load("train", number).image).save(folder / f"{number:04d}.png")
    return folder


def subject(config: ExtractConfig, backbone: Backbone | None) -> Subject:
    """The plan of a configuration, and an extractor around a backbone; by default it is loaded."""
    plan = mm.plan(config)
    if backbone is None:
        extractor = load_extractor(plan.config, plan.backbone)
    else:
        plan = with_shape(plan, backbone.info)
        extractor = Extractor(
            backbone,
            layers=plan.config.layers or (),
            timesteps=plan.config.timesteps or (),
            vocabularies=plan.config.concepts or {},
            noise=plan.config.noise,
            guidance=plan.config.guidance,
            variants=variants_of(1, flip=False),
        )
    loaded = load_batch(plan, "all", range(plan.total))
    return Subject(
        plan=plan,
        extractor=extractor,
        samples=[sample for sample in loaded if isinstance(sample, PreparedSample)],
    )


def with_shape(plan: ExtractionPlan, info: BackboneInfo) -> ExtractionPlan:
    """A plan for FLUX.1 with another number of blocks and heads."""
    vocabularies = [
        replace(words, blocks=info.double_blocks, map_blocks=info.concept_blocks)
        for words in plan.schema.vocabularies
    ]
    schema = replace(plan.schema, channels=info.channels, vocabularies=tuple(vocabularies))
    return replace(plan, backbone=info, schema=schema)


def batches(subject: Subject) -> list[Sequence[PreparedSample]]:
    size = subject.plan.config.batch_size or 1
    return [subject.samples[start : start + size] for start in range(0, len(subject.samples), size)]


@torch.inference_mode()
def bare_loop(subject: Subject) -> None:
    """What no extraction can do without, on pictures that are in memory."""
    backbone, config = subject.extractor.backbone, subject.plan.config
    times = torch.tensor(config.timesteps, device=backbone.device)
    for batch in batches(subject):
        prompts = backbone.encode_prompts([""] * len(batch)).repeat_each(len(times))  # from its own cache
        clean = backbone.encode_image(torch.from_numpy(np.stack([sample.image for sample in batch])))
        noise = draw_batch(config.noise, [sample.sample_id for sample in batch], len(times), clean.shape[1:])
        noised = add_noise(clean, noise.to(clean.device), times, config.noise.form).flatten(0, 1)
        backbone.forward(noised, times.repeat(len(batch)), prompts, config.guidance)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def unstored(subject: Subject) -> None:
    """Features in memory, and nothing done with them."""
    for batch in batches(subject):
        subject.extractor(batch)


def whole(subject: Subject, folder: Path, numbers: "itertools.count[int]") -> None:
    """From PNG files to a finished store; the backbone is loaded already."""
    plan = replace(
        subject.plan, config=replace(subject.plan.config, store=str(folder / f"store-{next(numbers)}"))
    )
    identity = {"benchmark": True, "noise": plan.config.noise.to_json(), "fit": plan.config.fit}
    manifest = Manifest(identity=identity, schema=plan.schema, splits=plan.samples)
    with open_writer(plan.store, manifest) as writer:
        for partition in writer.pending("all"):
            with writer.begin(partition) as out:
                run_partition(plan, subject.extractor, out, lambda _: None)


def measure(asked: argparse.Namespace, folder: Path) -> list[str]:
    """The figures as lines of Markdown."""
    backbone = random_flux(asked.heads, asked.blocks, asked.device) if asked.random_flux else None
    config = ExtractConfig(
        dataset="images",
        data_root=str(pictures(folder / "pictures", asked.samples)),
        backbone="flux-dev" if backbone else "flux-scenes",
        device=asked.device,
        resolution=asked.resolution,
        store=str(folder / "store"),
        batch_size=asked.batch_size,
    )
    if backbone is not None:
        config = replace(config, layers=backbone.info.layers, timesteps=backbone.info.timesteps)
    full, plain = subject(config, backbone), subject(replace(config, concepts={}), backbone)
    numbers = itertools.count()
    ways: dict[str, Callable[[], object]] = {
        BARE: lambda: bare_loop(plain),
        UNSTORED: lambda: unstored(plain),
        PLAIN: lambda: whole(plain, folder, numbers),
        WHOLE: lambda: whole(full, folder, numbers),
    }
    taken = interleaved(ways, asked.rounds)
    return report(plain, taken, asked)


def report(subject: Subject, taken: dict[str, list[float]], asked: argparse.Namespace) -> list[str]:
    plan, config = subject.plan, subject.plan.config
    backbone = subject.extractor.backbone
    machine = (
        torch.cuda.get_device_name(backbone.device)
        if backbone.device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    info = backbone.info
    work = operations_a_sample(replace(config, layers=info.layers), info) * len(subject.samples)
    lines = [
        f"# Extraction against the bare model, {time.strftime('%Y-%m-%d')}",
        "",
        f"{info.name}, {info.architecture.double_blocks} double and {info.architecture.single_blocks} single "
        f"blocks of {info.channels} channels, {config.resolution} px, {backbone.dtype!s}, batches of "
        f"{config.batch_size} x {len(config.timesteps or ())} timesteps, {len(config.layers or ())} layers; "
        f"{len(subject.samples)} pictures, {asked.rounds} interleaved rounds, median (interquartile range). "
        f"{machine}, torch {torch.__version__}.",
        "",
        "| | images/s | share of the bound | |",
        "|---|---|---|---|",
    ]
    for way, seconds in taken.items():
        speed = len(subject.samples) / statistics.median(seconds)
        rate = f"{show_operations(work / statistics.median(seconds))}/s" if way == BARE else ""
        lines.append(f"| {way} | {speed:.2f} | {ratios(seconds, taken[BARE])} | {rate} |")
    stored = plan.raw_bytes / len(subject.samples) / 1e6
    lines += ["", f"{stored:.1f} MB a picture before compression, without concept maps."]
    if backbone.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(backbone.device) / 1024**3
        lines.append(f"Peak GPU memory {peak:.1f} GiB.")
    return lines


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resolution", type=int, help="512 for FLUX.1 unless said otherwise")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--random-flux", action="store_true", help="FLUX.1's shape with random weights")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels, for --random-flux")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single")
    parser.add_argument("--out", type=Path, help="also write the table here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish(measure(asked, Path(folder)), asked.out)


if __name__ == "__main__":
    main()
