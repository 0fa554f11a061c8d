"""The original's tokenizers for this package: the same ids, one image token, chat templates that know images."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .key_maps import RELEASES

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_TOKEN_IDS = {release: 12 if release.startswith("minimind3") else 190 for release in RELEASES}
# Byte FF in the alphabet of byte-level BPE. It never occurs in UTF-8, so no text has this token and no merge uses it.
UNUSED_BYTE = "ÿ"


def wrap_tokenizer(source: str | Path, release: str, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or repository of the original, for this package.

    Args:
        source: Folder or Hub repository with the original's `tokenizer.json` and `tokenizer_config.json`.
        release: Whose chat template it gets. The two forms of the older tokenizer (with `<s>` or `<|im_start|>`) are
            told apart by their own special tokens.
        max_length: Positions of the model.

    Returns:
        A tokenizer that pads on the left, with `<|image_pad|>` as a special token.

    Raises:
        ValueError: Not the tokenizer of that release: the image token has another id.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, padding_side="left", model_max_length=max_length)
    template = "minimind3"
    if not release.startswith("minimind3"):
        tokenizer = with_image_token(tokenizer)
        of_bos = {"<|im_start|>": "minimind2", "<s>": "minimind1" if release == "minimind1" else "minimind2-early"}
        release = template = of_bos.get(str(tokenizer.bos_token), release)
    token_id, expected = tokenizer.get_vocab().get(IMAGE_TOKEN), IMAGE_TOKEN_IDS[release]
    if token_id != expected:
        raise ValueError(
            f"The tokenizer in {source} is not that of {release}: the id of {IMAGE_TOKEN} is {token_id} instead of "
            f"{expected}. Name the original's tokenizer folder of that release."
        )
    if tokenizer.pad_token is None:  # minimind1 names none, and pads with id 0
        tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = guard(tokenizer) + read_template(template)
    return tokenizer


def with_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer before MiniMind-3's with `<|image_pad|>` in the place of the byte that no text contains.

    The original writes an image as 196 times `@`, or as `<` and `>`, which are also characters of texts.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    if UNUSED_BYTE not in vocabulary or IMAGE_TOKEN in vocabulary:
        return tokenizer
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(UNUSED_BYTE)
    renamed = Tokenizer.from_str(json.dumps(content))
    # Named image_token, it is a special token like MiniMind-3's, with the id that it has in the vocabulary. The first
    # release says add_prefix_space in its configuration, but was trained as its tokenizer.json says: without.
    changes = {"image_token": IMAGE_TOKEN, "add_prefix_space": content["pre_tokenizer"]["add_prefix_space"]}
    return PreTrainedTokenizerFast(tokenizer_object=renamed, **tokenizer.init_kwargs | changes)


def guard(tokenizer: PreTrainedTokenizerFast) -> str:
    """Beginning of a chat template that refuses the tokenizer's control tokens where a user has typed them."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return read_template("guard").replace("CONTROL_TOKENS", json.dumps(tokens))


def read_template(release: str) -> str:
    """Renders plain strings as the original's template, image parts as `<|image_pad|>`, and marks the answers."""
    return (Path(__file__).parent / "templates" / f"{release}.jinja").read_text(encoding="utf-8")
