"""Tiny models and processors of every kind, made here, and real picture files."""

import io
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are taken by the other processes

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

from minimind_v import MiniMindConfig, MiniMindVConfig, MiniMindVForConditionalGeneration, MiniMindVProcessor

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINT = REPOSITORY / "checkpoints" / "minimind-v-emoji"
CODE = sorted(path.name for path in REPOSITORY.glob("*_minimind_v.py"))  # what goes along with every saved model
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOWERS = {
    "clip": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False},
    "blocks": {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8, "vision_use_head": False},
    "naflex": {"model_type": "siglip2_vision_model", "num_patches": 64, "patch_size": 8, "vision_use_head": False},
}
PROJECTORS = {
    "clip": {"projector_type": "linear"},
    "blocks": {"projector_merge_size": 4, "projector_merge_order": "block"},
    "naflex": {"projector_merge_size": 4, "projector_norm": False},
}
KINDS = [("clip", False), ("clip", True), ("siglip", False), ("siglip", True), ("blocks", False), ("naflex", False)]
IDS = [f"{tower}-{'experts' if moe else 'dense'}" for tower, moe in KINDS]


def make_text_config(moe=False, **changes):
    """MiniMind-3's form; with experts also the shared one of MiniMind2."""
    fields = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512}
    if moe:
        fields |= {"use_moe": True, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 24}
    return MiniMindConfig(**fields | changes)


def make_config(tower="siglip", moe=False, projector_type=None, **text_changes):
    vision = TOWERS[tower] | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    projector = PROJECTORS.get(tower, {}) | ({"projector_type": projector_type} if projector_type else {})
    return MiniMindVConfig(
        text_config=make_text_config(moe, **text_changes),
        vision_config=vision | {"num_hidden_layers": 2},
        image_token_id=3,
        **projector,
    )


def make_model(tower="siglip", moe=False, **changes):
    """Random weights, large enough that every token of the prompt shows in the answer."""
    torch.manual_seed(0)
    model = MiniMindVForConditionalGeneration(make_config(tower, moe, **changes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    model.generation_config.update(suppress_tokens=[3], pad_token_id=0, eos_token_id=None, max_new_tokens=12)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer_object():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    words = ["user assistant system", "What is this? Describe the picture.", "这是什么？图片里有什么？"]
    tokenizer.train_from_iterator(words * 20, trainer)
    return tokenizer


@pytest.fixture
def make_processor(tokenizer_object):
    def make(tower="siglip", **changes):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_object.to_str()),
            pad_token=SPECIAL_TOKENS[0],
            unk_token=SPECIAL_TOKENS[0],
            bos_token=SPECIAL_TOKENS[1],
            eos_token=SPECIAL_TOKENS[2],
            padding_side="left",
            model_max_length=512,
        )
        if tower == "clip":
            size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
            image_processor = CLIPImageProcessorPil(**size)
        elif tower == "naflex":
            image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64)
        else:
            side = TOWERS[tower]["image_size"]
            image_processor = SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3)
        arguments = {"image_seq_length": 16, "chat_template": CHAT_TEMPLATE} | changes
        return MiniMindVProcessor(image_processor, tokenizer, **arguments)

    return make


@pytest.fixture
def processor(make_processor):
    return make_processor()


def picture(seed=0, size=(40, 30), mode="RGB"):
    """A picture with structure at several scales; every seed another one."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / 20
    channels = [np.sin((seed + 1) * x + c) * np.cos((seed + 2) * y - c) for c in range(3)]
    return Image.fromarray(np.uint8(127.5 + 127.5 * np.stack(channels, -1))).convert(mode)


@pytest.fixture
def pictures():
    return [picture(seed) for seed in range(4)]


def user(*parts):
    """A user turn: pictures and strings in the given order."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def split_images(inputs, images=slice(None)):
    """Model inputs without images, and those of (some of) the images."""
    names = [name for name in inputs if name.startswith("pixel_") or name == "spatial_shapes"]
    rest = {name: value for name, value in inputs.items() if name not in names}
    return rest, {name: inputs[name][images] for name in names}


@pytest.fixture
def encode():
    """Chats -> model inputs, left-padded."""

    def encode(processor, *chats, **options):
        return processor.apply_chat_template(
            [chat if isinstance(chat, list) else [chat] for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **options,
        )

    return encode


# --- Training data ---------------------------------------------------------------------------------------------------


def png(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def caption_row(image, question="What is this?", answer="A cat."):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    answer = [{"type": "text", "text": answer}]  # Arrow wants one type in all rows
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


@pytest.fixture
def folder(tmp_path):
    """Six pictures with captions as an image folder."""
    rows = []
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
        rows.append({"file_name": f"{seed}.png", "text": f"Picture {seed}."})
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    return tmp_path
