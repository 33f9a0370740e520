"""DINOv3's vision transformer: the patch tokens that single blocks put out. Paper: Sec. 3.3."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer, DINOv3ViTModel

from mmdiff_cache.encoders.info import EncoderInfo
from mmdiff_cache.encoders.weights import PROCESSOR, hash_encoder, read_json
from mmdiff_cache.errors import BackboneError
from mmdiff_cache.pretrained import full_precision_convolutions, load_whole

logger = logging.getLogger(__name__)


class DINOv3:
    """A frozen DINOv3 ViT in float32, whose chosen blocks are read."""

    def __init__(self, info: EncoderInfo, model: nn.Module, *, folder: Path) -> None:
        self.info = info
        self.weights_sha256 = hash_encoder(folder)
        self._model = model.requires_grad_(False).eval()
        blocks = [module for module in model.modules() if isinstance(module, DINOv3ViTLayer)]
        self._tapped = [blocks[int(layer)] for layer in info.layers]
        self._device = next(model.parameters()).device
        self._scale, self._mean, self._deviation = _normalisation(folder)

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B H W 3"]) -> Float32[Tensor, "B L h w D"]:
        """Outputs of the blocks `info.layers`, patch tokens alone, without the norm behind the last block.

        Pictures come as the backbone has them; sides are whole patches (EncoderInfo.grid).
        """
        pixels = images.to(self._device).to(torch.float32) * self._scale
        pixels = (pixels - self._mean.to(self._device)) / self._deviation.to(self._device)
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            stack.enter_context(full_precision_convolutions())
            for block in self._tapped:
                stack.callback(block.register_forward_hook(cast(Callable[..., None], keep)).remove)
            self._model(rearrange(pixels, "B H W c -> B c H W"))
        rows, columns = (side // self.info.patch for side in images.shape[1:3])
        # The class token and the registers stand before the patches.
        patches = [tokens[:, -rows * columns :] for tokens in outputs]
        return rearrange(patches, "L B (h w) D -> B L h w D", h=rows)


def load_dinov3(info: EncoderInfo, folder: Path, *, device: str | torch.device) -> DINOv3:
    """The model in a folder, on a device. Raises BackboneError when its weights cannot be used."""
    logger.info("loading %s from %s: float32, %s", info.name, folder, device)
    model = load_whole(DINOv3ViTModel, folder, info.name, dtype=torch.float32)
    return DINOv3(info, model.to(device), folder=folder)


def _normalisation(folder: Path) -> tuple[float, Tensor, Tensor]:
    """What the model's own processor does to bytes: a factor, then mean and deviation of each channel."""
    stated = read_json(folder, PROCESSOR)
    try:
        factor = float(stated["rescale_factor"])
        mean, deviation = torch.tensor(stated["image_mean"]), torch.tensor(stated["image_std"])
        steps = [stated[name] for name in ("do_rescale", "do_normalize")]
    except (KeyError, TypeError, ValueError) as error:
        raise BackboneError(
            f"{folder / PROCESSOR} does not say how pictures are normalised ({error})"
        ) from error
    if steps != [True, True] or mean.shape != (3,) or deviation.shape != (3,):
        raise BackboneError(f"{folder / PROCESSOR} must rescale and normalise three channels")
    return factor, mean, deviation
