"""`render_scene`: one scene of the world, its picture, exact labels, caption and facts about each object."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmdiff_cache.scenes.camera import F32, grid
from mmdiff_cache.scenes.captions import Named, scene_prompt, write_caption
from mmdiff_cache.scenes.labels import SUBSAMPLES, U8, average, label
from mmdiff_cache.scenes.render import look, shade
from mmdiff_cache.scenes.sampler import Draw, draw_scene
from mmdiff_cache.scenes.world import check_address, stream

NOISE = 5  # the pixel noise is the difference of two whole numbers below this, over 255


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """What is known of one object. Lengths in metres; shares in 0..1."""

    shape: str
    colour: str
    texture: str
    size: float  # width seen from the front
    position: tuple[float, float]  # x to the right of the camera, z ahead of it
    rotation: float  # radians about the vertical
    lying: bool
    visible_pixels: int  # at the scene's size
    hidden_share: float  # of its silhouette: hidden by others or cut by the frame
    mean_depth: float  # of its visible part
    salience: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """One rendered scene. Arrays are [H W]; the picture is RGB.

    class_mask indexes CLASS_NAMES and material_mask MATERIAL_NAMES; both hold IGNORE where nothing owns 60 %
    of a pixel. depth is in metres along the optical axis, 0 where invalid (sky). salient_mask is 1 on the
    salient object, 0 off it, IGNORE on its border. instance_mask is i + 1 on object i, 0 on sky and ground.
    """

    split: str
    index: int
    size: int
    image: U8
    class_mask: U8
    material_mask: U8
    depth: NDArray[np.float32]
    salient_mask: U8
    instance_mask: U8
    caption: str
    caption_order: tuple[int, ...]  # numbers of the objects, first named first
    prompt_scene: str  # names ground and time alone
    objects: tuple[SceneObject, ...]
    salient_index: int
    ground: str
    time_of_day: str

    @property
    def sample_id(self) -> str:
        """Name of the scene, the same at every size: 'scenes-test-000012'."""
        return f"scenes-{self.split}-{self.index:06d}"


def render_scene(split: str, index: int, size: int = 128) -> Scene:
    """Render one scene at size x size pixels: the same bytes always, the same scene at every size.

    ConfigError for an unknown split, a negative index or a size below 16.
    """
    check_address(split, index, size)
    draw = draw_scene(stream(split, index, "layout"), hold_out=split == "pretrain")
    layout = draw.layout
    salient = draw.salience.index(max(draw.salience))
    axis = grid(size, SUBSAMPLES)
    view = look(layout, axis, axis)
    labels = label(view.surface, view.depth, layout.bodies, salient)
    objects = _objects(draw, labels.visible_pixels)
    named = tuple(
        Named(shape=one.shape, colour=one.colour, texture=one.texture, depth=one.mean_depth, hides=hides)
        for one, hides in zip(objects, draw.hides, strict=True)
    )
    caption = write_caption(stream(split, index, "caption"), named, layout.ground, layout.time_of_day)
    return Scene(
        split=split,
        index=index,
        size=size,
        image=_expose(average(shade(layout, view)), stream(split, index, "noise")),
        class_mask=labels.class_mask,
        material_mask=labels.material_mask,
        depth=labels.depth.astype(np.float32),
        salient_mask=labels.salient_mask,
        instance_mask=labels.instance_mask,
        caption=caption.text,
        caption_order=caption.order,
        prompt_scene=scene_prompt(layout.ground, layout.time_of_day),
        objects=objects,
        salient_index=salient,
        ground=layout.ground,
        time_of_day=layout.time_of_day,
    )


def _objects(draw: Draw, visible: tuple[int, ...]) -> tuple[SceneObject, ...]:
    return tuple(
        SceneObject(
            shape=body.shape,
            colour=body.colour,
            texture=body.texture,
            size=body.size,
            position=(body.x, body.z),
            rotation=body.rotation,
            lying=body.lying,
            visible_pixels=visible[number],
            hidden_share=draw.hidden[number],
            mean_depth=draw.depth[number],
            salience=draw.salience[number],
        )
        for number, body in enumerate(draw.layout.bodies)
    )


def _expose(colours: F32, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes out of colours 0..1, with a little noise in brightness and colour."""
    grain = rng.integers(0, NOISE, (2, *colours.shape), dtype=np.int16)
    levels = np.floor(colours * np.float32(255) + np.float32(0.5)).astype(np.int16)
    return np.clip(levels + grain[0] - grain[1], 0, 255).astype(np.uint8)
