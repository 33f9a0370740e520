"""The six everyday commands. Each parses, calls the public names, prints, and ends with the line to type
next.

Everything heavy is imported inside the commands, so that `--help` stays quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff_cache.cli.configuration import compose, parse_list, parse_numbers, parse_vocabularies
from mmdiff_cache.cli.console import TRAIN, next_command, next_training, print_json, progress_bar, say, warn
from mmdiff_cache.config import ExtractConfig, TrainConfig
from mmdiff_cache.errors import ConfigError

if TYPE_CHECKING:
    from mmdiff_cache.extraction.plan import ExtractionPlan

SOME_FAILED = 3

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A recipe (.py) or the config.json of an earlier run.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other field, named as in config.json."),
]
Layers = Annotated[
    str | None, typer.Option(metavar="A,B", help="Transformer blocks, such as single.4,single.15.")
]
Timesteps = Annotated[
    str | None, typer.Option(metavar="T,T", help="Noise levels in [0, 1]; 1 is pure noise.")
]
BatchSize = Annotated[int | None, typer.Option(help="Samples at once.")]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Only the first N samples of every split.")
]
Subset = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Only N training samples, drawn by subset_seed.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
MovedStore = Annotated[Path | None, typer.Option(help="Where the run's store lies now, if it was moved.")]
OneTask = Annotated[str | None, typer.Option("--task", help="Which one, for a run of several tasks.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that 'train' wrote.")]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo writes.")] = Path("demo"),
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples of each split; fewer are quicker and score worse."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Another backbone than the bundled one.")] = None,
) -> None:
    """Show the whole main job on rendered scenes: extract, train three heads, evaluate, predict, draw."""
    from mmdiff_cache.demo import run_demo

    result = run_demo(out, limit=limit, backbone=backbone, say=say, bar=progress_bar)
    next_command(*result.next_command)


def extract(
    dataset: Annotated[str | None, typer.Option(help="Data set: scenes, images ...")] = None,
    data_root: Annotated[str | None, typer.Option(help="Folder of the data set's files.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="A split to extract; may be repeated.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="A known name, a folder in diffusers' format, or org/name on the hub.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder to write; data/<dataset>/<backbone> by default.")
    ] = None,
    layers: Layers = None,
    timesteps: Timesteps = None,
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WORD,...]",
            help="A vocabulary or preset; may be repeated; 'none' for none.",
        ),
    ] = None,
    discriminative: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Encoders beside it: dinov3-vitb16, or folders.")
    ] = None,
    cross_attention: Annotated[
        bool | None, typer.Option("--cross-attention", help="Also keep averaged text-to-image attention.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the network input in pixels.")] = None,
    fit: Annotated[
        str | None, typer.Option(help="How a picture becomes square: squash, pad or crop.")
    ] = None,
    batch_size: BatchSize = None,
    attention: Annotated[
        str | None, typer.Option(metavar="NAME", help="Attention backend: native, flash, xformers ...")
    ] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks; default on a GPU.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="empty, scene, oracle, or a file of prompts (.jsonl, or .txt to draw).")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="Where pictures are drawn, when to capture: renoise, trajectory or nearest."),
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Noise draws of every sample.")] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip", help="Also take each draw of the mirrored picture.")
    ] = None,
    limit: Limit = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add samples that the store was not planned with.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Processes, one a GPU; 0: this one. All visible GPUs by default."
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|FILE", help="A running dask cluster to join; see docs/clusters.md."),
    ] = None,
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the disk seems too small.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
) -> None:
    """Stage one: run the backbone once over a data set and keep its features. Safe to stop and run again."""
    import mmdiff_cache as mm
    from mmdiff_cache.extraction.plan import on_workers, with_time

    flags = {
        "dataset": dataset,
        "data_root": data_root,
        "splits": split or None,
        "backbone": backbone,
        "store": store,
        "layers": parse_list(layers),
        "timesteps": parse_numbers("--timesteps", timesteps),
        "concepts": parse_vocabularies(concepts),
        "discriminative": parse_list(discriminative),
        "cross_attention": cross_attention,
        "resolution": resolution,
        "fit": fit,
        "batch_size": batch_size,
        "attention": attention,
        "compile": compile_,
        "prompts": prompts,
        "draws": draws,
        "flip": flip,
        "limit": limit,
    }
    chosen_mode = [] if mode is None else [f"generation.mode={mode}"]
    plan = mm.plan(compose(ExtractConfig, "extract", config, flags, [*chosen_mode, *(set_ or [])]))
    if scheduler is None:
        plan = on_workers(plan, workers)
    if dry_run:
        say(str(with_time(plan)))
    else:
        say(str(plan))
        _carry_out(plan, workers, scheduler, append=append, force=force, profile=profile)


def _carry_out(
    plan: "ExtractionPlan",
    workers: int | None,
    scheduler: str | None,
    *,
    append: bool,
    force: bool,
    profile: bool,
) -> None:
    """Extract as planned, and say what came of it."""
    import mmdiff_cache as mm
    from mmdiff_cache.extraction.placement import open_cluster
    from mmdiff_cache.extraction.profile import Profile

    spent = Profile(on=profile)
    with open_cluster(plan.config, workers, scheduler) as client:
        if client is not None and client.dashboard_link:
            say(f"{'dashboard':<10} {client.dashboard_link}")
        with progress_bar("extract") as advance:
            written = mm.extract(
                plan,
                progress=advance,
                append=append,
                force=force,
                workers=0 if client is None else None,  # where it runs is decided by now
                client=client,
                profile=spent,
            )
    say(f"\n{written}")
    if profile:
        say(f"\n{spent}")
    labels = written[TRAIN].label_specs.values() if TRAIN in written.splits else ()
    if labels:
        label = min(labels, key=lambda spec: spec.name)
        next_training(label.name, label.kind, written.path)
    else:
        next_command("mmdiff-cache", "inspect", str(written.path))
    if written.samples_failed:
        warn(f"{written.samples_failed} samples failed; 'mmdiff-cache inspect {written.path}' says why")
        raise typer.Exit(SOME_FAILED)


def train(
    task: Annotated[
        str | None, typer.Option(help="segmentation, saliency or depth; A+B trains one model for both.")
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(help="A store to learn from; may be repeated. By default the only fitting one."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Folder to write, or to go on with.")] = None,
    layers: Layers = None,
    timesteps: Timesteps = None,
    concepts: Annotated[
        str | None, typer.Option(help="A stored vocabulary, 'cross_attention' or 'none'.")
    ] = None,
    decoder: Annotated[str | None, typer.Option(help="deeplabv3plus, dpt or linear.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    batch_size: BatchSize = None,
    limit: Subset = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
) -> None:
    """Stage two: train an aggregator and a head from a store alone; the backbone is never loaded."""
    if task is None and config is None:
        raise ConfigError("train needs --task segmentation, saliency or depth (or --config FILE)")
    flags = {
        "task": task,
        "stores": store or None,
        "run": run,
        "layers": parse_list(layers),
        "timesteps": parse_numbers("--timesteps", timesteps),
        "concepts": concepts,
        "decoder": decoder,
        "steps": steps,
        "batch_size": batch_size,
        "limit": limit,
        "seed": seed,
    }
    import mmdiff_cache as mm
    from mmdiff_cache.training.plan import plan

    planned = plan(compose(TrainConfig, "train", config, flags, set_ or []))
    say(f"{planned}\n")
    with progress_bar("train") as advance:
        trained = mm.train(planned, progress=advance)
    say(str(trained))
    several = ["--task", trained.tasks[0]] if len(trained.tasks) > 1 else []
    next_command("mmdiff-cache", "evaluate", str(trained.path), *several)


def evaluate(
    run: RunFolder,
    split: Annotated[
        str | None, typer.Option(help="Split to score; the first of final, test and val that there is.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema, raw or best.")] = "ema",
    align: Annotated[
        str, typer.Option(help="Fit each predicted depth to its truth first: none, median or lstsq.")
    ] = "none",
    flip: Annotated[
        bool, typer.Option("--flip", help="Average with the stored features of the mirrored picture.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the predictions, a PNG a sample.")
    ] = None,
    task: OneTask = None,
    store: MovedStore = None,
    train_baselines: Annotated[
        bool, typer.Option("--train-baselines", help="First train the baselines that need it; kept in RUN.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a trained run on a split of its store, beside the trivial baselines."""
    import mmdiff_cache as mm

    with progress_bar("evaluate") as advance:
        scores = mm.evaluate(
            run,
            split,
            weights,
            align=align,
            flip=flip,
            export=export,
            with_trained_baselines=train_baselines,
            store=store,
            task=task,
            progress=advance,
        )
    if as_json:
        return print_json(scores.to_json())
    say(str(scores))
    of_several = [] if task is None else ["--task", task]
    return next_command("mmdiff-cache", "predict", str(run), "photo.jpg", *of_several)


def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of any size.")],
    task: OneTask = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN/predictions by default.")] = None,
) -> None:
    """Apply a trained run to new pictures: colour PNG, raw array, and a page that shows them side by side."""
    import mmdiff_cache as mm

    folder = out or run / "predictions"
    with progress_bar("predict") as advance:
        predictions = mm.predict(mm.load_model(run, task=task), images, out=folder, progress=advance)
    for prediction in predictions:
        say(str(prediction))
    say(f"\npage  {folder / 'index.html'}")


def inspect(
    store: Annotated[Path | None, typer.Argument(metavar="[STORE]", help="Folder of a store.")] = None,
    as_json: AsJson = False,
) -> None:
    """Without a store: every store under data/. With one: what it holds, its features' ranges, its labels."""
    from mmdiff_cache.cli import tables

    if store is None:
        tables.show_stores(as_json=as_json)
    else:
        tables.show_store(store, as_json=as_json)
