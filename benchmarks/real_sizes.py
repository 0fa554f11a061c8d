"""Models of the released sizes with random weights, and their processors, for the benchmarks."""

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from minimind_v import (
    EMBEDDED_MODEL,
    MiniMindConfig,
    MiniMindVConfig,
    MiniMindVForConditionalGeneration,
    MiniMindVProcessor,
)

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_B16 = CLIPVisionConfig(**BASE, image_size=224, patch_size=16)
SIGLIP_B32 = SiglipVisionConfig(**BASE, image_size=256, patch_size=32, vision_use_head=False)
MINIMIND2 = {"use_qk_norm": False, "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
# name -> tower, decoder; parameters of the decoder in the name
SIZES = {
    "minimind2-26m": (CLIP_B16, MINIMIND2 | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408}),
    "minimind2-104m": (CLIP_B16, MINIMIND2 | {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048}),
    "minimind3-65m": (SIGLIP_B32, {}),
    "minimind3-200m-experts": (SIGLIP_B32, {"use_moe": True}),
}


def peak_memory_gb() -> float:
    """The most memory that this process has had, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent had before this process was started
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own, whose peak memory is then its own too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def make_config(name: str) -> MiniMindVConfig:
    """Configuration of one of `SIZES`."""
    tower, decoder = SIZES[name]
    is_clip = tower.model_type == "clip_vision_model"
    return MiniMindVConfig(
        text_config=MiniMindConfig(max_position_embeddings=32768, **decoder),
        vision_config=tower,
        image_token_id=3,
        projector_type="linear" if is_clip else "mlp",
    )


def make_model(name: str, dtype: torch.dtype = torch.float32) -> MiniMindVForConditionalGeneration:
    """Model of one of `SIZES`, weights random with a fixed seed, in eval mode on CPU."""
    torch.manual_seed(0)
    model = MiniMindVForConditionalGeneration(make_config(name)).to(dtype).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model


def make_processor(config: MiniMindVConfig) -> MiniMindVProcessor:
    """Its processor, with the tokenizer of the embedded model: whose ids are all below the 6,400 of the decoder."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, model_max_length=32768)
    is_clip = config.vision_config.model_type == "clip_vision_model"
    size = {"height": 256, "width": 256}
    image_processor = CLIPImageProcessorPil() if is_clip else SiglipImageProcessorPil(size=size)
    return MiniMindVProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def answer_in_words(model: MiniMindVForConditionalGeneration, tokenizer: Any) -> None:
    """Makes random weights answer with plain words that depend on the whole prompt, and never end.

    So answers have the length that was asked for, near ties do not decide, and the text is the same however a runtime
    decodes parts of characters. Fresh weights, which are small, would repeat the last token of the prompt.
    """
    ids = range(model.config.get_text_config().vocab_size)
    tokens = [(token or "").strip("Ġ") for token in tokenizer.convert_ids_to_tokens(ids)]
    is_word = torch.tensor([token.isascii() and token.isalpha() for token in tokens])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 4
        model.get_input_embeddings().weight[~is_word] *= 0.05


def save_checkpoint(name: str, folder: Path) -> Path:
    """Saves a model of one of `SIZES` with its processor."""
    model = make_model(name)
    processor = make_processor(model.config)
    answer_in_words(model, processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
