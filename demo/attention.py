"""Where a model looks: the attention of each word of its answer to the patches of a picture."""

import re
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from ..configuration_minimind_v import MiniMindVConfig
from ..inference.engine import Engine, encode, question

SIDE = 640  # of what is drawn, in pixels


class Look(NamedTuple):
    """What [`look`] found, of an answer of W words to a prompt of T tokens.

    Attributes:
        image: The image, as far as the tower sees it.
        words: The words of the answer.
        attention: `[W, T + tokens of the answer]`: how the attention is shared out while a word is chosen, averaged
            over layers, heads and the tokens of the word. Rows sum to 1.
        maps: `[W, rows, columns]`: its part on each patch of the image.
        seen: The tokens of the prompt, each with its kind: "image", "control" or "text".
    """

    image: Image.Image
    words: list[str]
    attention: torch.Tensor
    maps: torch.Tensor
    seen: list[tuple[str, str]]


def look(engine: Engine, image: Image.Image, text: str, template_options: dict[str, Any]) -> Look:
    """Asks a question about an image, and then the model where it looked for its answer.

    Args:
        engine: The model; it answers as set.
        image: RGB.
        text: The question.
        template_options: For the chat template.

    Raises:
        ValueError: As [`encode`] and [`Engine.generate`].
    """
    model, tokenizer = engine.model, engine.processor.tokenizer
    inputs = encode(engine.processor, [[question([image], text)]], template_options).to(engine.device)
    prompt = inputs["input_ids"][0]
    answer = engine.generate(inputs)[0]
    answer = answer[~torch.isin(answer, torch.tensor(tokenizer.all_special_ids))]
    sequence = torch.cat([prompt, answer.to(prompt.device)])[None]
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    before: Any = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that says what it attends to
    try:
        with torch.no_grad():
            layers = model(input_ids=sequence, **pixels, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    attention = torch.stack([layer[0].float().mean(dim=0) for layer in layers]).mean(dim=0).cpu()
    # A token is chosen at the place before it
    attention = attention[len(prompt) - 1 : -1]
    words = [(word, places) for word, places in split_words(tokenizer, answer.tolist()) if word.strip()]
    attention = torch.stack([attention[places].mean(dim=0) for _, places in words]) if words else attention[:0]

    is_image = (prompt == model.config.image_token_id).cpu()
    shape = inputs["spatial_shapes"][0].tolist() if "spatial_shapes" in inputs else None
    on_image = attention[:, : len(prompt)][:, is_image]
    maps = torch.stack([patch_map(row, model.config, shape) for row in on_image]) if words else on_image
    if getattr(engine.processor.image_processor, "do_center_crop", False):
        side = min(image.size)
        image = ImageOps.fit(image, (side, side))
    return Look(
        image, [word.strip() for word, _ in words], attention, maps, describe_tokens(tokenizer, prompt, is_image)
    )


def patch_map(values: torch.Tensor, config: MiniMindVConfig, shape: list[int] | None) -> torch.Tensor:
    """What belongs to the tokens of an image, `[S]`, for each patch of the tower, `[rows, columns]`.

    Args:
        values: One per token.
        config: Of the model.
        shape: Rows and columns of patches that a NaFlex tower got; None for other towers, whose images are square.
    """
    vision: Any = config.vision_config
    size = config.projector_merge_size
    rows, columns = shape or [vision.image_size // vision.patch_size] * 2
    if shape is None and len(values) * size > rows * columns:
        values = values[1:]  # CLS, which stands nowhere
    if size > 1 and config.projector_merge_order == "block":
        side = round(size**0.5)
        values = values.view(rows // side, columns // side) / size
        return values.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (values / size).repeat_interleave(size)[: rows * columns].view(rows, columns)


def split_words(tokenizer: Any, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Words of a text with the places of their tokens. Of Chinese, each token, or several that make a character."""
    words: list[tuple[str, list[int]]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue  # bytes of a character that goes on
        places = list(range(start, end))
        if words and re.match(r"[A-Za-z0-9'.,!?-]", text) and re.search(r"[A-Za-z0-9'-]$", words[-1][0]):
            words[-1] = (words[-1][0] + text, words[-1][1] + places)
        else:
            words.append((text, places))
        start = end
    return words


def describe_tokens(tokenizer: Any, prompt: torch.Tensor, is_image: torch.Tensor) -> list[tuple[str, str]]:
    """The tokens of a prompt with their kinds; an image's in one, with their number."""
    special, seen = set(tokenizer.all_special_ids), []
    for token, image in zip(prompt.tolist(), is_image.tolist(), strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False).replace("\n", "⏎")
        if not image:
            seen.append((text, "control" if token in special else "text"))
        elif not seen or seen[-1][1] != "image":
            seen.append((f"{text} × {int(is_image.sum())}", "image"))
    return seen


def draw(image: Image.Image, values: torch.Tensor) -> Image.Image:
    """The image, bright where it is looked at.

    Args:
        image: RGB.
        values: `[rows, columns]`; the least is dark, the greatest bright.
    """
    image = ImageOps.contain(image, (SIDE, SIDE))
    low, high = values.aminmax()
    heat = ((values - low) / (high - low).clamp_min(1e-9)).mul(255).byte().numpy()
    mask = Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)
    dark = Image.blend(ImageOps.grayscale(image).convert("RGB"), Image.new("RGB", image.size, "#182030"), 0.8)
    return Image.composite(image, dark, mask)
