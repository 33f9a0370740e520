"""A Gemma 3 of the real classes, as small as it can be, with processor and chat template; random weights."""

from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaTokenizer,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

IMAGE_TOKENS, SIDE = 4, 32
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
IMAGE = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
CHARACTERS = "\n▁abcdefghijklmnopqrstuvwxyzDITW.,:"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def save_tiny_gemma(folder: Path, *, seed: int = 0) -> Path:
    """Two text layers of 32 channels; a picture is 32 x 32 pixels and four tokens, words are letters."""
    torch.manual_seed(seed)
    pieces = [*SPECIAL, *IMAGE, *CHARACTERS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=[],
        extra_special_tokens={
            "boi_token": IMAGE[0],
            "eoi_token": IMAGE[1],
            "image_token": IMAGE[2],
        },
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[5:])}, False)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=len(pieces),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            max_position_embeddings=1024,
            initializer_range=0.5,
            tie_word_embeddings=False,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
            vision_use_head=False,
        ),
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=vocabulary[IMAGE[0]],
        eoi_token_index=vocabulary[IMAGE[1]],
        image_token_index=vocabulary[IMAGE[2]],
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)
    model.save_pretrained(folder)
    Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        image_seq_length=IMAGE_TOKENS,
    ).save_pretrained(folder)
    return folder
