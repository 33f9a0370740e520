"""Scores of a trained run on a split of its store, beside what can be had without features."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdiff_cache.config import filled
from mmdiff_cache.errors import ConfigError, StorageError
from mmdiff_cache.loader import CachedFeatureDataset
from mmdiff_cache.records import Progress
from mmdiff_cache.store.reader import Store
from mmdiff_cache.tasks import Task, aligning, find_task, headline
from mmdiff_cache.training import checkpoint
from mmdiff_cache.training.baselines import (
    Fitting,
    baselines_for,
    trained_config,
    trained_folder,
    trained_for,
)
from mmdiff_cache.training.build import open_dataset
from mmdiff_cache.training.checkpoint import EMA, LAST, RAW
from mmdiff_cache.training.division import divide
from mmdiff_cache.training.export import Export
from mmdiff_cache.training.mirror import Mirror
from mmdiff_cache.training.protocol import Way, in_words
from mmdiff_cache.training.report import Evaluation
from mmdiff_cache.training.resolve import TRAIN_SPLIT
from mmdiff_cache.training.run import (
    Run,
    device_of,
    load_run,
    model_for_run,
    one_task,
    store_of,
    train,
    weights_of,
)
from mmdiff_cache.training.scoring import Predictor, Scores, model_predictor, score
from mmdiff_cache.training.statistics import PictureStatistics, picture_statistics, write_statistics

logger = logging.getLogger(__name__)

SPLITS = ("final", "test", "val")
"""Splits that are scored when none is named, the first that the store has."""


def evaluate(
    run: Run | str | Path,
    split: str | None = None,
    weights: str = EMA,
    *,
    align: str = "none",
    flip: bool = False,
    export: str | Path | None = None,
    with_trained_baselines: bool = False,
    store: str | Path | None = None,
    task: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a run on a split, by default the first of SPLITS that the store has; batches are streamed.

    Weights are `ema` (the average at the last step, the default), `raw` or `best`; averaged and raw are both
    scored. The baselines that are trainings of their own are shown once they are trained;
    `with_trained_baselines` trains them first. `store` says where the run's store lies now. `task` is one of
    those of a run of several. The result is also written into the run's folder.

    `align` gives each predicted depth, the baselines' too, a scale (`median`) or scale and shift (`lstsq`)
    that fit its truth; such numbers compare with those of relative depth, not of metric depth.
    `flip` averages the run's outputs, logits or metres, with those of the stored mirrored twin.
    `export` is a folder for the predictions themselves, a PNG a sample; see `training.export`.

    Raises ConfigError for a split or weights there are not, CheckpointError for a run that cannot be used or
    belongs to another store, StoreError for a store that cannot be read.
    """
    several = len(load_run(run).tasks) > 1
    run = one_task(run, task)
    entry = aligning(find_task(run.config.task, run.config.label), align)
    opened = store_of(run, store)
    way = Way(split=pick_split(opened, split), weights=weights, align=align, flip=flip)
    dataset = open_dataset(run.config, opened, way.split)
    predictors = _predictors(run, entry, weights, Mirror(dataset, way.split) if flip else None)
    files = None if export is None else _export(run, export, dataset, entry, way)
    if files is not None:
        predictors[weights] = files.watching(predictors[weights])
    if with_trained_baselines:
        train_baselines(run, opened, progress)
    simple = baselines_for(_fitting(run, opened, dataset))
    found = _scores(run, {**predictors, **simple}, dataset, entry, progress)
    if files is not None:
        files.finish()
    scores = {name: found[name].overall for name in found}
    trained = _trained_scores(run, opened, way.split, entry)
    result = dataclasses.replace(
        _evaluation(run, dataset, entry, way, found[weights]),
        other_weights={name: scores[name] for name in predictors if name != weights},
        baselines={**{name: scores[name] for name in simple}, **trained},
        untrained=tuple(name for name in trained_for(run.config) if name not in trained),
        export=None if export is None else str(export),
    )
    statistics = picture_statistics(
        found[weights], dataset, entry, way, data_set=run.origin["dataset"], step=run.step
    )
    _keep(run, result, statistics, f"{entry.name}-{way.name}" if several else way.name)
    return result


def _scores(
    run: Run,
    predictors: Mapping[str, Predictor],
    dataset: CachedFeatureDataset,
    task: Task,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """Score predictors at the labels' original size, in the batches of a run."""
    return score(
        predictors,
        dataset,
        task,
        data_set=run.origin["dataset"],
        original=True,
        batch_size=filled(run.config.batch_size),
        progress=progress,
    )


def _evaluation(run: Run, dataset: CachedFeatureDataset, task: Task, way: Way, found: Scores) -> Evaluation:
    """The scores of a run's weights, with what is known of the run; without anything beside them."""
    data_set: str = run.origin["dataset"]
    return Evaluation(
        run=str(run.path),
        task=task.name,
        label=task.label,
        data_set=data_set,
        split=way.split,
        samples=len(dataset),
        backbone=run.origin["backbone"],
        prompts=run.origin["prompts"],
        source=run.config.source,
        weights=way.weights,
        step=_step(run, way.weights),
        headline=headline(task, data_set),
        higher_is_better=task.higher_is_better,
        scores=found.overall,
        other_weights={},
        baselines={},
        per_sample=found.samples,
        align=way.align,
        flip=way.flip,
        protocol=in_words(dataset, task, way),
        ending=run.ending,
    )


def _step(run: Run, weights: str) -> int:
    """The step that weights are of; the best ones may be older than the others."""
    return checkpoint.read_header(weights_of(run, weights)[0]).step


def _export(run: Run, folder: str | Path, dataset: CachedFeatureDataset, task: Task, way: Way) -> Export:
    """A folder for the predictions, claimed."""
    what = {
        "run": str(run.path.absolute()),
        "step": _step(run, way.weights),
        "weights": way.weights,
        "task": task.name,
        "label": task.label,
        "data_set": run.origin["dataset"],
        "split": way.split,
        "flip": way.flip,
    }
    label = dataset.reader.label_specs[task.label]
    return Export(Path(folder).expanduser(), dataset, label, what, in_words(dataset, task, way))


def _fitting(run: Run, store: Store, dataset: CachedFeatureDataset) -> Fitting:
    """What the label-free baselines may look at: the labels that the run was trained on."""
    task = find_task(run.config.task, run.config.label)
    trained = divide(run.config, store[TRAIN_SPLIT], task.label).trained
    return Fitting(
        task=task,
        label=dataset.reader.label_specs[task.label],
        data_set=run.origin["dataset"],
        training=open_dataset(run.config, store, TRAIN_SPLIT, trained),
        reader=dataset.reader,
    )


def _predictors(run: Run, task: Task, weights: str, mirror: Mirror | None) -> dict[str, Predictor]:
    """The run with the weights asked for, and with the averaged and the raw ones."""
    models = {name: model_for_run(run, name) for name in dict.fromkeys((weights, EMA, RAW))}
    device, precision = device_of(run), run.config.precision
    return {name: model_predictor(one.to(device), task, precision, mirror) for name, one in models.items()}


def train_baselines(run: Run, store: Store, progress: Progress | None = None) -> dict[str, Run]:
    """Train the baselines that need it, with equal steps, in the run's folder; finished ones are kept."""
    config = dataclasses.replace(run.config, stores=(str(store.path),))
    return {
        name: train(trained_config(entry, config, run.path), progress)
        for name, entry in trained_for(run.config).items()
    }


def _trained_scores(run: Run, store: Store, split: str, task: Task) -> dict[str, Mapping[str, Any]]:
    """Scores of those trained baselines of a run that have finished."""
    results: dict[str, Mapping[str, Any]] = {}
    for name, entry in trained_for(run.config).items():
        folder = trained_folder(entry, run.config, run.path)
        if not (folder / LAST).exists() or not load_run(folder).finished:
            continue
        other = load_run(folder)
        model = model_for_run(other).to(device_of(other))
        predictor = model_predictor(model, task, other.config.precision)
        found = _scores(other, {name: predictor}, open_dataset(other.config, store, split), task)
        results[name] = found[name].overall
    return results


def pick_split(store: Store, split: str | None) -> str:
    """The split that was named, or the first of SPLITS that a store has. Raises ConfigError for none."""
    if split is None:
        split = next((name for name in SPLITS if name in store.splits), None)
        if split is None:
            raise ConfigError(
                f"{store.path} has none of the splits {', '.join(SPLITS)}; "
                f"name one of {', '.join(store.splits)} with --split"
            )
    if split not in store.splits:
        raise ConfigError(f"{store.path} has no split {split!r}; it has {', '.join(store.splits)}")
    return split


def _keep(run: Run, result: Evaluation, statistics: PictureStatistics, name: str) -> None:
    """Write the result beside the run; a folder that cannot be written costs only that."""
    try:
        write_statistics(run.path, statistics)
        checkpoint.write_json(run.path / f"evaluation-{name}.json", result.to_json())
        for what, table in result.tables().items():
            checkpoint.write_bytes(run.path / f"evaluation-{name}-{what}.csv", table.encode())
    except StorageError as error:
        logger.warning("the scores were not kept: %s", error)
