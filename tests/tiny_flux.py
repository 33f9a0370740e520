"""A FluxPipeline of the real classes, as small as it can be while its features depend on everything."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_LENGTH = 12
WHOLE_WORDS = ("object", "background", "near", "far")
"""Words that are one piece for the T5 tokenizer; every other word is spelt in letters."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_tiny_flux(folder: Path, *, seed: int = 0, double_blocks: int = 2, single_blocks: int = 4) -> Path:
    """Two double and four single blocks of 32 channels, an 8 x 8 pixel token, random weights."""
    torch.manual_seed(seed)
    t5_pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    t5_pieces += [(f"▁{word}", -1.0) for word in WHOLE_WORDS] + [(letter, -3.0) for letter in LETTERS]
    clip_pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_pieces),
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_pieces),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    clip_vocabulary = {piece: index for index, piece in enumerate(clip_pieces)}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=CLIPTokenizer(vocab=clip_vocabulary, merges=[], model_max_length=16),
        text_encoder_2=t5.eval(),
        tokenizer_2=T5TokenizerFast(vocab=t5_pieces, extra_ids=0, model_max_length=TEXT_LENGTH),
        transformer=transformer.eval(),
    ).save_pretrained(folder)
    return folder
