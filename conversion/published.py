"""What every release was published with: the names of its models, its vision tower and its tokenizer."""

from dataclasses import dataclass
from typing import NamedTuple


class Repository(NamedTuple):
    """The names of a repository.

    Args:
        hub: On the Hub.
        modelscope: On ModelScope, where it differs.
    """

    hub: str
    modelscope: str = ""


@dataclass(frozen=True)
class Published:
    """Where a release's tower and tokenizer are.

    Args:
        tower, tokenizer: Repositories of the Hub.
        tower_folder, tokenizer_folder: Where README and code of the original have them, in a clone of it.
        models: Repositories of the models themselves, in the form of transformers.
    """

    tower: Repository
    tower_folder: str
    tokenizer: Repository
    tokenizer_folder: str
    models: tuple[Repository, ...] = ()


MINIMIND1 = Repository("jingyaogong/minimind-v-v1")
MINIMIND2 = Repository("jingyaogong/MiniMind2-V", "gongjy/MiniMind2-V")
MINIMIND3 = Repository("jingyaogong/minimind-3v", "gongjy/minimind-3v")
CLIP_PATCH16 = Repository("openai/clip-vit-base-patch16", "openai-mirror/clip-vit-base-patch16")

PUBLISHED = {
    "minimind1": Published(
        tower=Repository("openai/clip-vit-base-patch32", "openai-mirror/clip-vit-base-patch32"),
        tower_folder="model/clip_model/clip-vit-base-patch32",
        tokenizer=MINIMIND1,
        tokenizer_folder="model/minimind_tokenizer",
        models=(MINIMIND1, Repository("jingyaogong/minimind-v-v1-small")),
    ),
    "minimind2-early": Published(
        tower=CLIP_PATCH16,
        tower_folder="model/vision_model/clip-vit-base-patch16",
        # Its tokenizer.json is that of the release before, byte for byte; MiniMind2-V may hold the later release's.
        tokenizer=MINIMIND1,
        tokenizer_folder="model/minimind_tokenizer",
    ),
    "minimind2": Published(
        tower=CLIP_PATCH16,
        tower_folder="model/vision_model/clip-vit-base-patch16",
        tokenizer=MINIMIND2,
        tokenizer_folder="model",
        models=(MINIMIND2, Repository("jingyaogong/MiniMind2-Small-V")),
    ),
    "minimind3-naflex": Published(
        tower=Repository("jingyaogong/siglip2-base-p16-ve", "gongjy/siglip2-base-p16-ve"),
        tower_folder="model/siglip2-base-p16-ve",
        tokenizer=MINIMIND3,
        tokenizer_folder="model",
    ),
    "minimind3-p16": Published(
        tower=Repository("jingyaogong/siglip2-base-p16-256-ve", "gongjy/siglip2-base-p16-256-ve"),
        tower_folder="model/siglip2-base-p16-256-ve",
        tokenizer=MINIMIND3,
        tokenizer_folder="model",
    ),
    "minimind3": Published(
        tower=Repository("jingyaogong/siglip2-base-p32-256-ve", "gongjy/siglip2-base-p32-256-ve"),
        tower_folder="model/siglip2-base-p32-256-ve",
        tokenizer=MINIMIND3,
        tokenizer_folder="model",
        models=(MINIMIND3, Repository("jingyaogong/minimind-3v-moe")),
    ),
}


def modelscope_name(repository: str) -> str:
    """What a repository of the Hub is called on ModelScope."""
    known = [name for source in PUBLISHED.values() for name in (source.tower, source.tokenizer, *source.models)]
    return next((name.modelscope for name in known if name.hub == repository and name.modelscope), repository)
