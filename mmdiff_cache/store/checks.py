"""What may enter a partition.

A batch that does not fit is a fault of the program and raises; a sample that does not is one of the data: it
fails.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.errors import StoreError
from mmdiff_cache.records import STATISTICS, FeatureBatch, LabelSpec, PreparedSample

from .arrays import CROSS_ATTENTION, ArraySpec, discriminative_path
from .records import is_text
from .schema import LabelArray, StoreSchema


def feature_arrays(features: FeatureBatch) -> dict[str, NDArray[Any]]:
    """The arrays of a batch by their path in the store."""
    return {
        "hidden_states": features.hidden_states,
        "latents": features.latents,
        "audit": features.audit,
        **({} if features.sigmas is None else {"sigma": features.sigmas}),
        **{f"concepts/{name}/scores": scores for name, scores in features.concept_scores.items()},
        **{f"concepts/{name}/maps": maps for name, maps in features.concept_maps.items()},
        **{discriminative_path(name): maps for name, maps in features.discriminative.items()},
        **({} if features.cross_attention is None else {CROSS_ATTENTION: features.cross_attention}),
    }


def check_batch(specs: Mapping[str, ArraySpec], features: FeatureBatch, samples: int) -> None:
    """Raise StoreError unless the batch has exactly the arrays of the schema, in its shapes and dtypes."""
    given = feature_arrays(features)
    wanted = {
        p: s
        for p, s in specs.items()
        if p in ("hidden_states", "latents", "audit", "sigma", CROSS_ATTENTION)
        or p.startswith(("concepts/", "discriminative/"))
    }
    if given.keys() != wanted.keys():
        raise StoreError(f"a batch must hold the arrays {sorted(wanted)}, got {sorted(given)}")
    for path, array in given.items():
        expected = (samples, *wanted[path].shape[1:])
        dtype = "float16" if path == "hidden_states" else wanted[path].dtype
        if array.shape != expected or array.dtype != np.dtype(dtype):
            raise StoreError(
                f"{path} of a batch must be {dtype} {list(expected)}, got {array.dtype} {list(array.shape)}"
            )


def sample_fault(schema: StoreSchema, sample: PreparedSample, row: Mapping[str, NDArray[Any]]) -> str | None:
    """Why one sample cannot be stored, in words; None when it can. `row` holds its features by path."""
    reason = _non_finite(schema, row)
    if reason is not None:
        return reason
    if schema.drawn != (sample.generation_seed is not None):
        return "a picture that was drawn has a generation seed, and no other has one"
    if not is_text(sample.prompt):
        return f"prompt is not UTF-8 text: {sample.prompt!a}"
    if sample.image.dtype != np.uint8 or sample.image.shape != (*schema.image_size, 3):
        expected = [*schema.image_size, 3]
        return f"image must be uint8 {expected}, got {sample.image.dtype} {list(sample.image.shape)}"
    faults = (_label_fault(schema, label, sample) for label in schema.labels)
    return next((fault for fault in faults if fault is not None), None)


def _non_finite(schema: StoreSchema, row: Mapping[str, NDArray[Any]]) -> str | None:
    # The clamp before the cast hides infinite values from what is stored, but not from the audit.
    counted = row["audit"][..., STATISTICS.index("non_finite")]
    if counted.any():
        _, step, layer = (int(n) for n in np.argwhere(counted)[0])
        place = f"t = {schema.timesteps[step]:g}, layer {schema.layers[layer]}"
        return f"hidden states had {int(counted[0, step, layer])} values that are not finite at {place}"
    for path, values in row.items():
        bad = 0 if path == "audit" else values.size - int(np.isfinite(values).sum())
        if bad:
            return f"{path} has {bad} values that are not finite"
    return None


def stray_id(values: NDArray[Any], spec: LabelSpec) -> int | None:
    """An id in a label map that is neither a class nor the one to ignore; depths may be anything."""
    if spec.kind == "depth":
        return None
    known = values < (len(spec.classes) if spec.kind == "classes" else 2)
    stray = values[~(known if spec.ignore is None else known | (values == spec.ignore))]
    return int(stray.flat[0]) if stray.size else None


def _label_fault(schema: StoreSchema, label: LabelArray, sample: PreparedSample) -> str | None:
    name, dtype = label.spec.name, np.dtype("float32" if label.spec.kind == "depth" else "uint8")
    for maps, limit in ((sample.labels, schema.image_size), (sample.original_labels, label.canvas)):
        if name not in maps:
            return f"label {name} is missing"
        array = maps[name]
        if array.dtype != dtype or array.ndim != 2:
            return f"label {name} must be {dtype} with two axes, got {array.dtype} {list(array.shape)}"
        if maps is sample.labels and array.shape != limit:
            return f"label {name} must have network size {list(limit)}, got {list(array.shape)}"
        stray = stray_id(array, label.spec)
        if stray is not None:
            return f"label {name} has the value {stray}, which is no class and not ignored"
        if any(side > most for side, most in zip(array.shape, limit, strict=True)):
            return f"original label {name} has {list(array.shape)} pixels, the canvas holds {list(limit)}"
    return None
