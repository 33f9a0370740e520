"""Builds flux-scenes out of nothing: the seven parts of a `FluxPipeline`, with sound initial weights."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from mmdiff_cache.errors import ConfigError
from mmdiff_cache.flux_scenes.tokens import clip_tokenizer, t5_tokenizer
from mmdiff_cache.scenes import VOCABULARY

ORIGIN = ("_name_or_path", "is_local", "local_files_only")
"""Fields of configurations that say where a part was loaded from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes of all parts. Lengths are counted in tokens."""

    double_blocks: int = 4
    single_blocks: int = 12
    heads: int = 4
    head_width: int = 32
    rotary_axes: tuple[int, int, int] = (8, 12, 12)
    latent_channels: int = 4
    autoencoder_widths: tuple[int, ...] = (16, 32, 64)  # one halving of the picture between neighbours
    text_width: int = 128
    text_layers: int = 2
    text_length: int = 48
    pooled_width: int = 64
    pooled_layers: int = 2
    scheduler_shift: float = 1.0

    @property
    def width(self) -> int:
        """Channels of the transformer's residual stream."""
        return self.heads * self.head_width


def build_autoencoder(arch: Architecture) -> AutoencoderKL:
    """Convolutional autoencoder without attention, so that a picture of any even size can pass."""
    levels = len(arch.autoencoder_widths)
    autoencoder = cast(Any, AutoencoderKL)(
        block_out_channels=arch.autoencoder_widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=arch.latent_channels,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for name, module in autoencoder.named_modules():
        if name.endswith(
            "conv2"
        ):  # residual branches start at zero: the network is shallow at first and learns faster
            nn.init.zeros_(cast(nn.Conv2d, module).weight)
    bias = cast(Tensor, autoencoder.encoder.conv_out.bias)
    nn.init.constant_(
        bias[arch.latent_channels :], -5.0
    )  # log-variance: little noise, or nothing is learnt at first
    return autoencoder


def build_transformer(arch: Architecture) -> FluxTransformer2DModel:
    """FLUX's transformer with every block an identity at first (zero gates) and a zero output."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * arch.latent_channels,
        num_layers=arch.double_blocks,
        num_single_layers=arch.single_blocks,
        attention_head_dim=arch.head_width,
        num_attention_heads=arch.heads,
        joint_attention_dim=arch.text_width,
        pooled_projection_dim=arch.pooled_width,
        guidance_embeds=True,
        axes_dims_rope=arch.rotary_axes,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            _initialise(name, module)
    return transformer


def build_text_encoder(arch: Architecture, vocabulary_size: int) -> T5EncoderModel:
    """A small T5 encoder: one vector a token."""
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=arch.text_width,
        d_kv=32,
        num_heads=arch.text_width // 32,
        d_ff=2 * arch.text_width,
        num_layers=arch.text_layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def build_pooled_encoder(arch: Architecture, vocabulary_size: int) -> CLIPTextModel:
    """A small CLIP text encoder: one vector a prompt, read at the end token."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=arch.pooled_width,
        intermediate_size=4 * arch.pooled_width,
        projection_dim=arch.pooled_width,
        num_hidden_layers=arch.pooled_layers,
        num_attention_heads=2,
        max_position_embeddings=arch.text_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def build_pipeline(arch: Architecture, *, seed: int = 0) -> FluxPipeline:
    """The whole pipeline, untrained, in fp32 and evaluation mode. The same seed gives the same weights."""
    words = t5_tokenizer(VOCABULARY, arch.text_length)
    pooled_words = clip_tokenizer(VOCABULARY, arch.text_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = build_autoencoder(arch)
        transformer = build_transformer(arch)
        text_encoder = build_text_encoder(arch, len(words))
        pooled_encoder = build_pooled_encoder(arch, len(pooled_words))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=arch.scheduler_shift),
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        text_encoder=pooled_encoder.eval(),
        tokenizer=pooled_words,
        text_encoder_2=text_encoder.eval(),
        tokenizer_2=words,
    )


def save_pipeline(pipeline: FluxPipeline, folder: Path) -> int:
    """Write the pipeline in fp16 as diffusers does; its own tensors stay fp32. Returns bytes written."""
    halves = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    originals = {
        name: {key: value.clone() for key, value in part.state_dict().items()}
        for name, part in halves.items()
    }
    for part in halves.values():
        part.half()
    pipeline.save_pretrained(folder)
    for name, part in halves.items():
        part.float().load_state_dict(originals[name])
    for name in ("text_encoder", "text_encoder_2"):
        _promise_fp32(folder / name / "config.json")
    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        _forget_origin(path)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _forget_origin(path: Path) -> None:
    """Leave out from which folder of which machine the parts were read: it is of no use on another."""
    config = json.loads(path.read_text())
    kept = {name: value for name, value in config.items() if name not in ORIGIN}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2) + "\n")


def _promise_fp32(path: Path) -> None:
    """Make transformers load the text encoders in fp32 by default, as diffusers loads the other parts."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def load_pipeline(folder: Path | str) -> FluxPipeline:
    """Read a pipeline folder in fp32, ready to be trained on. Raises ConfigError where there is none."""
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder} is not a folder; there is no pipeline to read")
    pipeline = FluxPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipeline, FluxPipeline)
    return pipeline


def describe(arch: Architecture, pipeline: FluxPipeline) -> dict[str, object]:
    """Sizes and parameter counts, for logs and the model card."""
    counts = {
        name: sum(weight.numel() for weight in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    return {"architecture": asdict(arch), "parameters": counts, "parameters_total": sum(counts.values())}


def _initialise(name: str, linear: nn.Linear) -> None:
    """As in DiT: modulations and the last layer start at zero, all else by Xavier (time embeddings: 0.02)."""
    is_modulation = name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"))
    if is_modulation or name == "proj_out":
        nn.init.zeros_(linear.weight)
    elif name.startswith("time_text_embed"):
        nn.init.normal_(linear.weight, std=0.02 if "linear_1" in name else 1 / math.sqrt(linear.in_features))
    else:
        nn.init.xavier_uniform_(linear.weight)
    if cast(Tensor | None, linear.bias) is not None:
        nn.init.zeros_(linear.bias)
