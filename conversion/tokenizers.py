"""The original's tokenizers, re-wrapped: the same ids, and chat templates that know pictures."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

IMAGE_TOKENS = {"minimind2-early": "@" * 196, "minimind2": "@" * 196, "minimind3": "<|image_pad|>"}
IMAGE_TOKEN_IDS = {"minimind2-early": 34, "minimind2": 34, "minimind3": 12}


def chat_template(generation: str) -> str:
    """Renders plain strings as the original's template, lists of parts with image placeholders, and marks answers."""
    return (Path(__file__).parent / "templates" / f"{generation}.jinja").read_text(encoding="utf-8")


def wrap_tokenizer(source: str | Path, generation: str, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or repository of the original, for this package.

    Args:
        source: Folder or Hub repository with the original's `tokenizer.json` and `tokenizer_config.json`.
        generation: Whose chat template it gets. The two forms of MiniMind2's tokenizer (with `<s>` or `<|im_start|>`)
            are told apart by their own special tokens.
        max_length: Positions of the model.

    Raises:
        ValueError: The image placeholder has another id than in the original's checkpoints.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, padding_side="left", model_max_length=max_length)
    if generation != "minimind3":
        generation = "minimind2-early" if tokenizer.bos_token == "<s>" else "minimind2"
    tokenizer.chat_template = chat_template(generation)
    token, expected = IMAGE_TOKENS[generation], IMAGE_TOKEN_IDS[generation]
    ids = set(tokenizer.encode(token, add_special_tokens=False))
    if ids != {expected}:
        raise ValueError(
            f"The tokenizer in {source} is not that of {generation}: its image placeholder {token[:13]!r} has the ids "
            f"{sorted(ids)[:5]} instead of {expected}."
        )
    return tokenizer
