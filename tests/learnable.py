"""A store whose labels can be read off its features: what a working training must learn from it.

Each token has one of four classes, shown in its hidden states as the largest of four channels under noise, at
every layer and timestep. Depth, material and salience follow from the class. Original labels are larger than
the network input and of another size for every sample.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmdiff_cache.datasets.scenes import LABELS as SCENES_LABELS
from mmdiff_cache.datasets.scenes import RenderedScenes
from mmdiff_cache.datasets.transforms import prepare
from mmdiff_cache.extraction.extractor import store_as_float16
from mmdiff_cache.records import FeatureBatch, LabelSpec, PreparedSample
from mmdiff_cache.store.manifest import Manifest
from mmdiff_cache.store.schema import Discriminative, LabelArray, StoreSchema, Variant, Vocabulary
from mmdiff_cache.store.writer import open_writer

GRID, PATCH, CHANNELS, LATENT = 4, 8, 32, 4
LAYERS, TIMESTEPS = ("single.1", "single.3", "single.5"), (0.78, 0.26, 0.001)
CLASSES = ("sky", "ground", "ball", "box")
METRES = np.array([20.0, 4.0, 2.0, 8.0], np.float32)
SALIENT = 2
IGNORE = 255
LABELS = (
    LabelSpec(name="segmentation", kind="classes", classes=CLASSES, ignore=IGNORE),
    LabelSpec(name="material", kind="classes", classes=CLASSES, ignore=IGNORE),
    LabelSpec(name="saliency", kind="mask", ignore=IGNORE),
    LabelSpec(name="depth", kind="depth", valid_range=(0.1, 40.0)),
)
BLOCKS = ("double.0", "double.1", "double.2")
MAP_BLOCKS = ("double.0", "double.2")
VOCABULARIES = {
    "segmentation": ("object", "background", "edges"),
    "saliency": ("salient", "contour"),
    "depth": ("near", "far"),
    "unified": ("object", "background", "near", "far"),
}


def make_schema(**changes: object) -> StoreSchema:
    values: dict[str, object] = {
        "layers": LAYERS,
        "timesteps": TIMESTEPS,
        "grid": (GRID, GRID),
        "channels": CHANNELS,
        "latent_channels": LATENT,
        "image_size": (GRID * PATCH, GRID * PATCH),
        "vocabularies": tuple(
            Vocabulary(name=name, concepts=words, blocks=BLOCKS, map_blocks=MAP_BLOCKS)
            for name, words in VOCABULARIES.items()
        ),
        "labels": tuple(LabelArray(spec=spec, canvas=(64, 64)) for spec in LABELS),
        "partition_size": 4,
    }
    return StoreSchema(**{**values, **changes})  # type: ignore[arg-type]


FOUR_VARIANTS = tuple(
    Variant(noise_draw=draw, flipped=flipped) for flipped in (False, True) for draw in (0, 1)
)
ENCODER = Discriminative(name="eyes", layers=("2", "11"), grid=(2, 2), channels=24)


def make_rich_schema(**changes: object) -> StoreSchema:
    """Two draws and their mirror images, attention maps and an encoder."""
    return make_schema(
        **{
            "variants": FOUR_VARIANTS,
            "cross_attention": BLOCKS,
            "discriminative": (ENCODER,),
            **changes,
        }
    )


def make_manifest(
    schema: StoreSchema, splits: dict[str, int], dataset: str, prompts: str, weights: str = "0" * 64
) -> Manifest:
    return Manifest(
        identity={
            "weights_sha256": weights,
            "dtype": "float32",
            "noise": {"form": "flow", "seed": 0, "shared": True},
        },
        schema=schema,
        splits={
            split: tuple(f"{dataset}-{split}-{n:06d}" for n in range(count))
            for split, count in splits.items()
        },
        provenance={"backbone": "flux-tiny"},
        config={"dataset": dataset, "prompts": prompts},
    )


def class_grid(sample_id: str) -> np.ndarray:
    return np.random.default_rng(_seed("classes", sample_id)).integers(0, len(CLASSES), (GRID, GRID))


def _seed(*words: str) -> list[int]:
    return list("/".join(words).encode())


def _stretch(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(side) * GRID // side for side in shape)
    return grid[rows[:, None], columns[None, :]]


def make_labels(grid: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    classes = _stretch(grid, shape).astype(np.uint8)
    void = np.zeros(shape, bool)
    void[0] = True
    return {
        "segmentation": np.where(void, IGNORE, classes).astype(np.uint8),
        "material": np.where(void, IGNORE, 3 - classes).astype(np.uint8),
        "saliency": np.where(void, IGNORE, classes == SALIENT).astype(np.uint8),
        "depth": np.where(void, 0, METRES[classes]).astype(np.float32),
    }


def make_sample(sample_id: str) -> PreparedSample:
    random = np.random.default_rng(_seed("sample", sample_id))
    grid, side = class_grid(sample_id), GRID * PATCH
    picture = np.repeat(_stretch(grid, (side, side))[..., None] * 60, 3, axis=2)
    original = tuple(int(n) for n in random.integers(40, 65, 2))
    return PreparedSample(
        sample_id=sample_id,
        image=(picture + random.integers(0, 40, picture.shape)).astype(np.uint8),
        prompt="",
        labels=make_labels(grid, (side, side)),
        original_labels=make_labels(grid, original),
        content_hash="0" * 64,
    )


def make_features(schema: StoreSchema, ids: list[str], noise: float = 1.0) -> FeatureBatch:
    """Every variant has noise of its own; a mirrored one shows the mirrored classes."""
    steps, layers, (rows, columns) = len(schema.timesteps), len(schema.layers), schema.grid
    variants = len(schema.variants)
    shape = (variants, steps, layers, rows, columns, schema.channels)
    hidden, latents, scores = [], [], {v.name: [] for v in schema.vocabularies}
    attention, encoded = [], {encoder.name: [] for encoder in schema.discriminative}
    for sample_id in ids:
        random = np.random.default_rng(_seed("features", sample_id))
        shown = np.zeros((variants, 1, 1, rows, columns, schema.channels), np.float32)
        if schema.grid == (GRID, GRID):
            for number, variant in enumerate(schema.variants):
                classes = class_grid(sample_id)[:, :: -1 if variant.flipped else 1]
                shown[number, ..., : len(CLASSES)] = np.eye(len(CLASSES))[classes] * 6
        hidden.append((shown + noise * random.standard_normal(shape)).astype(np.float16))
        latents.append(random.standard_normal((rows, columns, schema.latent_channels)).astype(np.float32))
        for v in schema.vocabularies:
            size = (variants, steps, len(v.blocks), len(v.concepts), rows, columns)
            scores[v.name].append((3 * random.standard_normal(size)).astype(np.float32))
        size = (variants, steps, len(schema.cross_attention), rows, columns)
        attention.append(random.uniform(0, 0.1, size).astype(np.float32))
        for encoder in schema.discriminative:
            size = (variants, len(encoder.layers), *encoder.grid, encoder.channels)
            encoded[encoder.name].append(random.standard_normal(size).astype(np.float16))
    stacked = {name: np.stack(rows_) for name, rows_ in scores.items()}
    hidden_states = np.stack(hidden)
    audits = [store_as_float16(torch.from_numpy(hidden_states[:, v]))[1].numpy() for v in range(variants)]
    return FeatureBatch(
        hidden_states=hidden_states,
        concept_scores=stacked,
        concept_maps={v.name: expected_maps(stacked[v.name], v) for v in schema.vocabularies},
        latents=np.stack(latents),
        audit=np.stack(audits, axis=1),
        cross_attention=np.stack(attention) if schema.cross_attention else None,
        discriminative={name: np.stack(maps) for name, maps in encoded.items()},
    )


def expected_maps(scores: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Scores [B V T block K h w] to maps [B V K h w], by torch: what the extraction stores."""
    places = [vocabulary.blocks.index(block) for block in vocabulary.map_blocks]
    shares = torch.from_numpy(scores)[:, :, :, places].softmax(dim=4)
    return shares.mean(dim=(2, 3)).numpy()


def write_store(
    path: Path,
    *,
    train: int = 16,
    test: int = 4,
    scored: str = "test",
    dataset: str = "blocks",
    prompts: str = "empty",
    schema: StoreSchema | None = None,
    failing: tuple[str, ...] = (),
    stop_after: int | None = None,
    sample: Callable[[str], PreparedSample] = make_sample,
    spoilt: str | None = None,
    weights: str = "0" * 64,
) -> Path:
    """Write a store through the real writer. `scored` is the name of its second split; `spoilt` is a sample
    whose features are as large as float16 can hold.
    """
    schema = schema or make_schema()
    manifest = make_manifest(schema, {"train": train, scored: test}, dataset, prompts, weights)
    with open_writer(path, manifest) as writer:
        pending = [partition for split in manifest.splits for partition in writer.pending(split)]
        for partition in pending[:stop_after]:
            with writer.begin(partition) as out:
                for offset, sample_id in enumerate(out.ids):
                    if sample_id in failing:
                        out.fail(offset, sample_id, "cannot be read")
                        continue
                    features = make_features(schema, [sample_id])
                    if sample_id == spoilt:
                        features.hidden_states[:] = 65504
                    out.write(offset, [sample(sample_id)], features)
                out.commit()
    return path


def write_scenes_store(path: Path, train: int = 8, test: int = 4) -> Path:
    """A store of real scenes, 32 px, with features that know nothing of them."""
    size = GRID * PATCH
    scenes = RenderedScenes(size)
    schema = make_schema(labels=tuple(LabelArray(spec=spec, canvas=(size, size)) for spec in SCENES_LABELS))

    def render(sample_id: str) -> PreparedSample:
        _, split, number = sample_id.split("-")
        return prepare(scenes.load(split, int(number)), size, "", specs=SCENES_LABELS)

    return write_store(path, train=train, test=test, dataset="scenes", schema=schema, sample=render)
