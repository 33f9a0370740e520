"""A StableDiffusion3Pipeline of the real classes, as small as it can be: dual, joint and last block."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny_flux import LETTERS, WHOLE_WORDS

T5_LENGTH, CLIP_LENGTH = 12, 16


def save_tiny_sd3(folder: Path, *, seed: int = 0, blocks: int = 4) -> Path:
    """Blocks of 32 channels, the first with a second attention as in SD3.5 medium; random weights."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    t5_pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    t5_pieces += [(f"▁{word}", -1.0) for word in WHOLE_WORDS] + [(letter, -3.0) for letter in LETTERS]
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
    clip_pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    clip_vocabulary = {piece: index for index, piece in enumerate(clip_pieces)}
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip_pieces),
                hidden_size=16,
                intermediate_size=37,
                projection_dim=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ).eval()
        for _ in range(2)
    ]
    tokenizers = [
        CLIPTokenizer(vocab=clip_vocabulary, merges=[], model_max_length=CLIP_LENGTH) for _ in range(2)
    ]
    StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5.eval(),
        tokenizer_3=T5TokenizerFast(vocab=t5_pieces, extra_ids=0, model_max_length=T5_LENGTH),
    ).save_pretrained(folder)
    return folder
