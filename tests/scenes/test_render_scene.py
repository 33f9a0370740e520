"""`render_scene`: the same bytes always, labels that agree with each other, and refusals with a remedy."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.scenes import (
    CLASS_NAMES,
    HELD_OUT_PAIRS,
    IGNORE,
    MATERIAL_NAMES,
    SHAPES,
    SPLITS,
    TEXTURES,
    Scene,
    render_scene,
)
from mmdiff_cache.scenes.camera import CAMERA_HEIGHT, FAR
from mmdiff_cache.scenes.world import stream

GOLDEN = "30be53b336d9db31"


def digest(scene: Scene) -> str:
    """Hash of everything in a scene that has bytes."""
    h = hashlib.sha256()
    for array in (scene.image, scene.class_mask, scene.material_mask, scene.depth, scene.salient_mask):
        h.update(np.ascontiguousarray(array).tobytes())
    h.update(f"{scene.caption}|{scene.prompt_scene}|{scene.caption_order}".encode())
    return h.hexdigest()[:16]


def test_golden_checksum() -> None:
    """A change here changes every store and weight made from scenes: raise WORLD_VERSION with it."""
    together = "".join(digest(render_scene(split, 7, 64)) for split in SPLITS if split != "final")
    assert hashlib.sha256(together.encode()).hexdigest()[:16] == GOLDEN


def test_same_bytes_in_a_fresh_process_and_in_any_order() -> None:
    here = [digest(render_scene("test", index, 48)) for index in (3, 1, 2)]
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_render_scene import digest, render_scene\n"
        "print(*[digest(render_scene('test', i, 48)) for i in (1, 2, 3)])"
    )
    folder = str(__file__).rsplit("/", 1)[0]
    out = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    one, two, three = out.stdout.split()
    assert here == [three, one, two]


@pytest.mark.parametrize("size", [16, 33, 64, 128])
def test_sizes(size: int) -> None:
    scene = render_scene("test", 12, size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert scene.depth.dtype == np.float32
    for array in (scene.class_mask, scene.material_mask, scene.salient_mask):
        assert array.shape == (size, size)
        assert array.dtype == np.uint8
    assert scene.depth.shape == (size, size)
    assert scene.size == size
    assert scene.sample_id == "scenes-test-000012"


def test_a_scene_is_the_same_at_every_size() -> None:
    small, large = render_scene("val", 5, 64), render_scene("val", 5, 128)
    assert small.caption == large.caption
    assert small.salient_index == large.salient_index
    agree = small.class_mask == large.class_mask[::2, ::2]
    assert agree.mean() > 0.95


def test_labels_agree_with_each_other(scenes: list[Scene]) -> None:
    for scene in scenes:
        classes, materials = scene.class_mask, scene.material_mask
        assert set(np.unique(classes)) <= {*range(len(CLASS_NAMES)), IGNORE}
        assert set(np.unique(materials)) <= {*range(len(MATERIAL_NAMES)), IGNORE}
        shapes = {CLASS_NAMES[k] for k in np.unique(classes) if 2 <= k < IGNORE}
        assert shapes <= {one.shape for one in scene.objects}
        textures = {MATERIAL_NAMES[k] for k in np.unique(materials) if 2 <= k < IGNORE}
        assert textures <= {one.texture for one in scene.objects}
        for background in (0, 1):
            assert np.array_equal(classes == background, materials == background)
        assert (scene.depth[classes == 0] == 0).all()
        assert (scene.depth[(classes != 0) & (classes != IGNORE)] > 0).all()
        assert (scene.depth >= 0).all()
        assert scene.depth.max() <= FAR
        salient = scene.objects[scene.salient_index]
        on = scene.salient_mask == 1
        owned = on & (classes != IGNORE)
        assert (classes[owned] == 2 + SHAPES.index(salient.shape)).all()
        owned = on & (materials != IGNORE)
        assert (materials[owned] == 2 + TEXTURES.index(salient.texture)).all()
        assert set(np.unique(scene.salient_mask)) <= {0, 1, IGNORE}
        assert on.sum() == pytest.approx(salient.visible_pixels, rel=0.25)


def test_the_instance_mask_tells_objects_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        counts = np.bincount(scene.instance_mask.ravel(), minlength=1 + len(scene.objects))[1:]
        assert counts.tolist() == [one.visible_pixels for one in scene.objects]
        assert set(np.unique(scene.class_mask[scene.instance_mask == 0])) <= {0, 1, IGNORE}
        on_salient = scene.instance_mask[scene.salient_mask == 1]
        assert (on_salient == scene.salient_index + 1).all()


def test_ground_gets_nearer_towards_the_bottom(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        ground = np.where(scene.class_mask == 1, scene.depth, np.nan)
        for column in range(0, scene.size, 9):
            line = ground[:, column][np.isfinite(ground[:, column])]
            assert (np.diff(line) <= 0).all()
            assert line.size == 0 or line.min() > CAMERA_HEIGHT / 2


def test_void_is_rare(scenes: list[Scene]) -> None:
    void = np.array([(scene.class_mask == IGNORE).mean() for scene in scenes])
    assert void.mean() < 0.008
    assert void.max() < 0.03


def test_pretraining_never_shows_a_held_out_pair_and_others_do(many: list[Scene]) -> None:
    pretrain = (render_scene("pretrain", index, 16) for index in range(150))
    seen = {(one.colour, one.shape) for scene in pretrain for one in scene.objects}
    assert not seen & set(HELD_OUT_PAIRS)
    assert len(seen) >= 38
    shown = [(one.colour, one.shape) in HELD_OUT_PAIRS for scene in many for one in scene.objects]
    assert 0.05 < np.mean(shown) < 0.12


def test_splits_share_no_scene() -> None:
    keys = {stream(split, index, "layout").integers(2**63) for split in SPLITS for index in range(400)}
    assert len(keys) == 400 * len(SPLITS)


@pytest.mark.parametrize(
    ("split", "index", "size", "says"),
    [("dev", 0, 64, "train, val, test"), ("test", -1, 64, "0 or more"), ("test", 0, 8, "at least 16")],
)
def test_refusals(split: str, index: int, size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        render_scene(split, index, size)


def test_scenes_import_numpy_alone() -> None:
    names = ("torch", "PIL", "scipy", "zarr")
    code = f"import sys, mmdiff_cache.scenes; print([name for name in {names} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
