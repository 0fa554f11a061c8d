"""Checkpoints of the original project -> checkpoints of this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig

from ..common import atomic_output, count_parameters, quiet_library, shorten
from ..configuration_minimind_v import MiniMindConfig, MiniMindVConfig
from ..modeling_minimind_v import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVMultiModalProjector
from ..processing_minimind_v import MiniMindVProcessor
from ..vision_tower_minimind_v import NAFLEX
from .configurations import read_arguments, text_config
from .key_maps import (
    LANGUAGE_MODEL,
    PROJECTOR,
    RELEASES,
    TOWER,
    detect_release,
    from_original,
    ignored_reason,
    rename_all,
)
from .reading import TOKENIZER_FILES, download, is_local, read_checkpoint
from .sources import fetch_checkpoint, find_parts
from .tokenizers import IMAGE_TOKEN, IMAGE_TOKEN_IDS, wrap_tokenizer
from .towers import make_image_processor, read_tower, read_tower_config

# What the releases have between tower and decoder, where it is not the default of our configuration, and their towers.
PROJECTORS = {
    "minimind1": {"projector_type": "linear", "vision_feature_select_strategy": "full"},
    "minimind2-early": {"projector_type": "linear"},
    "minimind2": {"projector_type": "linear"},
    "minimind3-naflex": {"projector_norm": False, "projector_merge_size": 4, "projector_merge_order": "sequence"},
    "minimind3-p16": {"projector_merge_size": 4, "projector_merge_order": "block"},
    "minimind3": {},
}
TOWER_KINDS = {"minimind1": "clip_vision_model", "minimind3-naflex": NAFLEX, "minimind3-p16": "siglip_vision_model"}

Source = TypeVar("Source", bound=dict[str, Any] | str | Path | None)


@dataclass(frozen=True)
class Summary:
    """What a conversion found and did; `str()` of it is the text that the command prints.

    Args:
        output: The folder that was written.
        release: The release of the original, one of [`RELEASES`].
        config: Configuration of the model.
        parameters: Number of parameters of each part, see [`count_parameters`].
        notes: What was ignored, assumed or left out, a sentence each.
    """

    output: Path
    release: str
    config: MiniMindConfig | MiniMindVConfig
    parameters: dict[str, int]
    notes: list[str]

    def __str__(self) -> str:
        text = self.config.get_text_config()
        kind = f"{text.num_experts} experts, {text.num_experts_per_tok} active" if text.use_moe else "dense"
        heads = f"{text.num_attention_heads} heads ({text.num_key_value_heads} key/value)"
        lines = [
            f"Release      {self.release}: {RELEASES[self.release]}",
            f"Sizes        {text.num_hidden_layers} layers of width {text.hidden_size}, {heads}, "
            f"vocabulary {text.vocab_size}, {kind}",
            *(f"{name.capitalize():<12} {count / 1e6:.1f}M parameters" for name, count in self.parameters.items()),
            *(f"Note         {note}" for note in self.notes),
            f"Written to   {self.output}",
        ]
        return "\n".join(lines)


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    vision_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    original_config: dict[str, Any] | str | Path | None = None,
    release: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    hub: str = "huggingface",
) -> Summary:
    """Turns a checkpoint of the original project into one of this package that computes the same numbers.

    Args:
        checkpoint: A `.pth` file of any release, or a folder or Hub repository in the original's transformers form.
        output: Folder to write. It appears only when it is complete.
        vision_encoder: Folder or Hub repository of the CLIP or SigLIP tower; left out, the checkpoint's own, or else
            the one that the release was published with, found here or fetched ([`find_parts`]; without one, a
            ValueError says how to get it). With a text-only checkpoint it makes a vision-language model with a fresh
            projector.
        tokenizer: Folder or Hub repository of the original's tokenizer; left out, that of a checkpoint folder, or else
            the one that the release was published with.
        original_config: The original constructor's arguments under its own names, as a dict or JSON file; left out,
            the released ones are assumed.
        release: One of [`RELEASES`]; left out, recognised from tensors, arguments and tower.
        dtype: Of all weights; left out, every tensor keeps its own.
        overwrite: Replace an `output` that is not empty.
        hub: Where repositories are: `"huggingface"`, or `"modelscope"` with the package modelscope.

    Returns:
        What was found and done; `summary.output` is the folder, `print(summary)` shows it all.

    Raises:
        FileExistsError: The output exists and is not empty.
        FileNotFoundError: The checkpoint does not exist.
        ValueError: Not a checkpoint, tensors are unknown, missing or of the wrong shape (the message lists them), or
            nothing tells which of two releases it is.

    Example:
        >>> print(convert_checkpoint("out/sft_vlm_768.pth", "minimind-3v"))
        >>> print(convert_checkpoint("jingyaogong/minimind-3v", "minimind-3v"))
    """
    output = Path(output).expanduser()
    checkpoint, vision_encoder = find_source(checkpoint, output), find_source(vision_encoder, output)
    tokenizer, original_config = find_source(tokenizer, output), find_source(original_config, output)
    bar = tqdm(total=4, desc="reading", unit="step", leave=False, disable=None)  # in terminals, until it is done
    with atomic_output(output, overwrite) as folder, bar as progress:
        if not is_local(checkpoint):
            checkpoint = fetch_checkpoint(str(checkpoint), hub=hub)
        if vision_encoder is not None and not is_local(vision_encoder):
            vision_encoder = download(str(vision_encoder), hub=hub)
        if tokenizer is not None and not is_local(tokenizer):
            tokenizer = download(str(tokenizer), TOKENIZER_FILES, hub=hub)
        state, arguments, files = read_checkpoint(checkpoint)
        if original_config is not None:
            arguments |= read_arguments(original_config)
        release = find_release(release, state, arguments, vision_encoder, checkpoint)
        advance(progress, "mapping")
        state, decoder, notes = map_tensors(state, release, arguments)
        if tokenizer is None and files is not None and (files / "tokenizer.json").exists():
            tokenizer = files
        has_projector, has_tower = (any(name.startswith(part) for name in state) for part in (PROJECTOR, TOWER))
        found_tower, found_tokenizer, found_notes = find_parts(
            release,
            files or Path(checkpoint).parent,
            needs_tower=vision_encoder is None and has_projector and not has_tower,
            needs_tokenizer=tokenizer is None,
            hub=hub,
        )
        vision_encoder = vision_encoder or find_source(found_tower, output)
        tokenizer = tokenizer or find_source(found_tokenizer, output)
        notes += found_notes
        state, config, vision_notes = add_vision(state, decoder, vision_encoder)
        notes += vision_notes
        advance(progress, "checking")
        model = fill_model(config, state)
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
        if dtype is not None:
            model.to(dtype)  # pyright: ignore[reportArgumentType] - the library's wrapper of it loses `self`
        elif len(dtypes) > 1:
            notes.append(f"tensors of {' and '.join(dtypes)}, kept as they are; make them one with --dtype")
        advance(progress, "writing")
        folder.mkdir()
        save_model(model, folder)
        if tokenizer is not None:
            save_processor(model, folder, release, tokenizer, vision_encoder)
        progress.update()
    return Summary(output, release, config, count_parameters(model), notes)


def find_source(source: Source, output: Path) -> Source | Path:
    """The path of a local source, which must not lie in the output; anything else as it is."""
    if source is None or isinstance(source, dict) or not is_local(source):
        return source
    path = Path(source).expanduser()
    if path.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"The output {output} holds {path}, which is read. Choose another output folder.")
    return path


def advance(progress: tqdm, step: str) -> None:
    """Shows that one step is done and the next begins."""
    progress.update()
    progress.set_description(step)


def find_release(
    release: str | None,
    state: dict[str, torch.Tensor],
    arguments: dict[str, Any],
    vision_encoder: str | Path | None,
    checkpoint: str | Path,
) -> str:
    """The release that was given, or the one that tensors, arguments and tower tell."""
    if release is not None:
        if release not in RELEASES:
            raise ValueError(f"There is no release {release!r}. Choose one of {', '.join(RELEASES)}, or leave it out.")
        return release
    shapes = {name: tensor.shape for name, tensor in state.items()}
    tower = shapes.get("vision_encoder.vision_model.embeddings.patch_embedding.weight")
    tower_width = tower[0] if tower else None
    if tower is None and vision_encoder is not None and "vision_proj.mlp.0.weight" in shapes:
        tower_width = read_tower_config(vision_encoder).hidden_size
    releases = detect_release(shapes, arguments, tower_width)
    if not releases:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of MiniMind: its tensors are called {sorted(state)[:4]} ... Choose a "
            f"file of one of the releases {', '.join(RELEASES)}."
        )
    if len(releases) > 1:
        raise ValueError(
            f"{checkpoint} may be of {' or '.join(releases)}, which have the same names of tensors, and nothing tells "
            f"them apart. Say which with --release, or give the original's arguments with --config."
        )
    return releases[0]


def map_tensors(
    state: dict[str, torch.Tensor], release: str, arguments: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], MiniMindConfig, list[str]]:
    """Tensors under the names of the vision-language model, the decoder's configuration, and notes."""
    reasons = [reason for name in state if (reason := ignored_reason(name))]
    notes = [f"ignored {reasons.count(reason)} tensors: {reason}" for reason in sorted(set(reasons))]
    state = {name: tensor for name, tensor in state.items() if not ignored_reason(name)}
    names = rename_all(state, release)
    if unknown := sorted(state.keys() - names.keys()):
        raise ValueError(f"Unknown tensors for {release}: {shorten(unknown)}. Choose another file or release.")
    shapes = {names[name]: tensor.shape for name, tensor in state.items()}
    try:
        config, assumed = text_config(shapes, release, arguments)
        assert config.head_dim is not None  # the tensors tell it
        state = from_original(state, release, config.head_dim)
    except KeyError as error:
        raise ValueError(f"Missing tensor for {release}: {error.args[0]}. Choose another file or release.") from None
    if assumed:
        notes.append("assumed, as released: " + ", ".join(assumed))
    if config.tie_word_embeddings:
        drop_tied_head(state)
    return state, config, notes


def drop_tied_head(state: dict[str, torch.Tensor]) -> None:
    """Takes out the output matrix, which is the embedding; the original saves both."""
    embedding = state[LANGUAGE_MODEL + "embed_tokens.weight"]
    if not torch.equal(state.pop("lm_head.weight", embedding), embedding):
        raise ValueError(
            "The output matrix differs from the embedding, but the configuration ties them. If they were trained "
            'apart, say so with --config: {"tie_word_embeddings": false}.'
        )


def add_vision(
    state: dict[str, torch.Tensor], decoder: MiniMindConfig, vision_encoder: str | Path | None
) -> tuple[dict[str, torch.Tensor], MiniMindConfig | MiniMindVConfig, list[str]]:
    """Adds what the checkpoint lacks of tower and projector; a text-only one without `vision_encoder` stays so.

    Returns the tensors under the final names, the configuration of the model, and notes.
    """
    has_projector = any(name.startswith(PROJECTOR) for name in state)
    if not (has_projector or vision_encoder or any(name.startswith(TOWER) for name in state)):
        return {name.replace(LANGUAGE_MODEL, "model."): tensor for name, tensor in state.items()}, decoder, []
    tower, tensors, assumed = read_tower(state, vision_encoder)
    notes = ["assumed, as released: " + ", ".join(assumed)] if assumed else []
    config = vision_language_config(decoder, tower, state)
    if not has_projector:
        tensors |= make_projector(config)
        notes.append("text-only checkpoint: the projector is new, with random weights")
    return state | tensors, config, notes


def vision_language_config(
    decoder: MiniMindConfig, tower: PreTrainedConfig, state: dict[str, torch.Tensor]
) -> MiniMindVConfig:
    """The whole model's configuration; projector and image token are those of the decoder's release.

    Raises:
        ValueError: The projector in `state` was trained with another kind of tower.
    """
    release = decoder.original_release
    fields: dict[str, Any] = dict(PROJECTORS[release])
    if any(name.startswith(PROJECTOR) for name in state):
        expected = TOWER_KINDS.get(release, tower.model_type)
        if tower.model_type != expected:
            raise ValueError(f"The vision tower of {release} is a {expected}; it cannot be a {tower.model_type}.")
        columns = state[PROJECTOR + "linear_1.weight"].shape[1] if "projector_merge_size" in fields else 0
        if columns and columns % tower.hidden_size == 0:
            fields["projector_merge_size"] = columns // tower.hidden_size
    return MiniMindVConfig(text_config=decoder, vision_config=tower, image_token_id=IMAGE_TOKEN_IDS[release], **fields)


def make_projector(config: MiniMindVConfig) -> dict[str, torch.Tensor]:
    """Tensors of a projector that is still to be trained."""
    projector = MiniMindVMultiModalProjector(config)
    with torch.device("meta"):
        model = MiniMindVForConditionalGeneration(config)
    projector.apply(model._init_weights)
    return {PROJECTOR + name: tensor for name, tensor in projector.state_dict().items()}


def fill_model(
    config: MiniMindConfig | MiniMindVConfig, state: dict[str, torch.Tensor]
) -> MiniMindForCausalLM | MiniMindVForConditionalGeneration:
    """The model with exactly these tensors.

    Raises:
        ValueError: Tensors are missing, unknown or of the wrong shape; the message lists them.
    """
    is_vision_language = isinstance(config, MiniMindVConfig)
    with torch.device("meta"):
        model = MiniMindVForConditionalGeneration(config) if is_vision_language else MiniMindForCausalLM(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "wrongly shaped": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {shorten(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The tensors do not fit the configuration. {listed}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model


def save_model(model: MiniMindForCausalLM | MiniMindVForConditionalGeneration, folder: Path) -> None:
    """Weights, configuration, code and generation settings."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if isinstance(model.config, MiniMindVConfig):
        model.generation_config.suppress_tokens = [model.config.image_token_id]  # an answer holds no image
    with quiet_library():
        model.save_pretrained(folder)


def save_processor(
    model: MiniMindForCausalLM | MiniMindVForConditionalGeneration,
    folder: Path,
    release: str,
    tokenizer: str | Path,
    vision_encoder: str | Path | None,
) -> None:
    """The processor, or for a text-only model the tokenizer."""
    processor = wrap_tokenizer(tokenizer, release, model.config.get_text_config().max_position_embeddings)
    if isinstance(model, MiniMindVForConditionalGeneration):
        image_processor = make_image_processor(model.model.vision_tower.config, vision_encoder, release)
        processor = MiniMindVProcessor(image_processor, processor, model.config.image_seq_length, IMAGE_TOKEN)
    processor.save_pretrained(folder)
