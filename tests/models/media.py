"""Models that look at an image, or listen, before they write."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from tests.models.family import MAX_MODEL_LEN, Asked, Family, texts
from tests.models.weights import save, sizes
from tests.stops.tiny_llama import make_tokenizer

SIDE, PATCH = 56, 14
"""Pixels of an image and of its patches."""
IMAGE_TOKENS = 16
HEARD_S = 2
FRAMES_A_SECOND = 100
HEARS = "full attention, and cross attention to what is heard"
WHOLE = {"max_num_batched_tokens": MAX_MODEL_LEN}


def make_blip2(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    size = {"height": SIDE, "width": SIDE}
    processor = Blip2Processor(BlipImageProcessorPil(size=size), tokenizer, IMAGE_TOKENS)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=MAX_MODEL_LEN,
        **{name: sizes()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **tower, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
        ),
        qformer_config=Blip2QFormerConfig(
            **tower, num_attention_heads=2, encoder_hidden_size=tower["hidden_size"]
        ),
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save(Blip2ForConditionalGeneration(config), folder)
    processor.save_pretrained(folder)
    return folder


def ask_about_images(model: Path) -> list[Asked]:
    """A text each, behind an image of its own."""
    from PIL import Image

    chance = random.Random(2)
    return [
        {
            "prompt": {
                **one,
                "multi_modal_data": {
                    "image": Image.frombytes("RGB", (SIDE, SIDE), chance.randbytes(3 * SIDE**2))
                },
            }
        }
        for one in texts(model)
    ]


def make_whisper(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_layers=8,
        decoder_attention_heads=4,
        decoder_ffn_dim=256,
        max_source_positions=HEARD_S * FRAMES_A_SECOND // 2,
        max_target_positions=MAX_MODEL_LEN,
        decoder_start_token_id=tokenizer.bos_token_id,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **{name: sizes()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    # Its embeddings are its head, too.
    save(WhisperForConditionalGeneration(config), folder, embedding_scale=0.1)
    heard = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=HEARD_S)
    WhisperProcessor(heard, tokenizer).save_pretrained(folder)
    return folder


FAMILIES = {
    "BLIP-2": Family("full attention; images", make_blip2, num_blocks=40, ask=ask_about_images),
    "Whisper": Family(
        HEARS,
        make_whisper,
        num_blocks=50,
        refusal="Encoder-decoder models are not currently supported with KV connectors",
        options=WHOLE,
    ),
}
