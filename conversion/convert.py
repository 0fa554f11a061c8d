"""Checkpoints of the original project -> checkpoints of this package."""

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedConfig,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..common import atomic_output, count_parameters, read_json
from ..configuration_minimind_v import MiniMindVConfig
from ..modeling_minimind_v import (
    MiniMindForCausalLM,
    MiniMindVForConditionalGeneration,
    MiniMindVMultiModalProjector,
)
from ..processing_minimind_v import MiniMindVProcessor
from .configurations import text_config, vision_config
from .key_maps import GENERATIONS, detect_generation, from_original, ignored_reason, rename
from .tokenizers import IMAGE_TOKEN_IDS, IMAGE_TOKENS, wrap_tokenizer

TOWERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
LANGUAGE_MODEL, TOWER, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."


@dataclass
class Summary:
    """What a conversion found and did; `str()` of it is the text that the command prints."""

    generation: str = ""
    config: PreTrainedConfig | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = self.config.get_text_config()
        kind = f"{text.num_experts} experts, {text.num_experts_per_tok} active" if text.use_moe else "dense"
        heads = f"{text.num_attention_heads} heads ({text.num_key_value_heads} key/value)"
        lines = [
            f"Generation   {self.generation}: {GENERATIONS[self.generation]}",
            f"Sizes        {text.num_hidden_layers} layers of width {text.hidden_size}, {heads}, "
            f"vocabulary {text.vocab_size}, {kind}",
            *(f"{name.capitalize():<12} {count / 1e6:.1f}M parameters" for name, count in self.parameters.items()),
            *(f"Note         {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    vision_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    original_config: dict[str, Any] | str | Path | None = None,
    generation: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    summary: Summary | None = None,
) -> Path:
    """Turns a checkpoint of the original project into one of this package that computes the same numbers.

    Args:
        checkpoint: A `.pth` file of any generation, or a folder or Hub repository in the original's transformers form.
        output: Folder to write. It appears only when it is complete.
        vision_encoder: Folder or Hub repository of the CLIP or SigLIP tower. Needed when the checkpoint has none; with
            a text-only checkpoint it makes a vision-language model with a fresh projector.
        tokenizer: Folder or Hub repository of the original's tokenizer; left out, that of a checkpoint folder.
        original_config: The original constructor's arguments under its own names, as a dict or JSON file; left out,
            the released ones are assumed.
        generation: One of [`GENERATIONS`]; left out, recognised from the names of the tensors.
        dtype: Of all weights; left out, every tensor keeps its own.
        overwrite: Replace an `output` that is not empty.
        summary: Filled with what was found, for example to print it.

    Returns:
        The output folder.

    Raises:
        FileExistsError: The output exists and is not empty.
        FileNotFoundError: The checkpoint does not exist.
        ValueError: Not a checkpoint, or tensors are unknown, missing or of the wrong shape; the message lists them.
    """
    summary, output = summary or Summary(), Path(output).expanduser()
    checkpoint, vision_encoder, tokenizer, original_config = (
        Path(source).expanduser() if isinstance(source, (str, Path)) and local_path(source) else source
        for source in (checkpoint, vision_encoder, tokenizer, original_config)
    )
    for source in (checkpoint, vision_encoder, tokenizer, original_config):
        if isinstance(source, Path) and source.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"The output {output} holds {source}, which is read. Choose another output folder.")
    with atomic_output(output, overwrite) as folder, tqdm(total=4, desc="reading", unit="step") as progress:
        state, arguments, files = read_checkpoint(checkpoint)
        if original_config is not None:
            arguments |= original_config if isinstance(original_config, dict) else read_json(original_config)
        summary.generation = generation or detect_generation(list(state)) or ""
        if summary.generation not in GENERATIONS:
            raise ValueError(
                f"{checkpoint} is not a checkpoint of MiniMind: its tensors are called {sorted(state)[:4]} ... The "
                f"generation must be one of {tuple(GENERATIONS)}; it was {generation!r}."
            )
        progress.update()
        progress.set_description("mapping")
        state = drop_ignored(state, summary)
        names = {name: rename(name, summary.generation) for name in state}
        if unknown := sorted(name for name, ours in names.items() if ours is None):
            raise ValueError(f"Unknown tensors for {summary.generation}: {shorten(unknown)}")
        shapes = {names[name]: tensor.shape for name, tensor in state.items()}
        try:
            decoder, assumed = text_config(shapes, summary.generation, arguments)
        except KeyError as error:
            raise ValueError(f"Missing tensor for {summary.generation}: {error.args[0]}") from None
        state = from_original(state, summary.generation, decoder.head_dim)
        state = untie(state, decoder)

        has_tower, has_projector = any(TOWER in name for name in state), any(PROJECTOR in name for name in state)
        if not (has_tower or has_projector or vision_encoder):
            summary.config, model_class = decoder, MiniMindForCausalLM
            state = {name.replace(LANGUAGE_MODEL, "model."): tensor for name, tensor in state.items()}
        else:
            tower, tower_state, tower_note = read_tower(shapes if has_tower else None, vision_encoder)
            assumed += tower_note
            if not has_tower:
                state |= tower_state
            summary.config, model_class = vision_language_config(decoder, tower), MiniMindVForConditionalGeneration
            if not has_projector:
                summary.notes.append("text-only checkpoint: the projector is new, with random weights")
        if assumed:
            summary.notes.append("assumed, as released: " + ", ".join(assumed))
        progress.update()
        progress.set_description("checking")
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
        if dtype is None and len(dtypes) > 1:
            summary.notes.append(f"tensors of {' and '.join(dtypes)}, kept as they are; make them one with --dtype")
        model = fill_model(model_class, summary.config, state, fresh_projector=not has_projector)
        summary.parameters = count_parameters(model)
        if dtype is not None:
            model.to(dtype)
        progress.update()
        progress.set_description("writing")
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        if model_class is MiniMindVForConditionalGeneration:
            model.generation_config.suppress_tokens = (
                [summary.config.image_token_id] if summary.generation == "minimind3" else None
            )
        folder.mkdir()
        model.save_pretrained(folder)
        source = tokenizer or (files if files and (files / "tokenizer.json").exists() else None)
        if source is None:
            summary.notes.append("no tokenizer was given: the output has no processor; name one with --tokenizer")
        else:
            wrapped = wrap_tokenizer(source, summary.generation, decoder.max_position_embeddings)
            if model_class is MiniMindVForConditionalGeneration:
                length, token = summary.config.image_seq_length, IMAGE_TOKENS[summary.generation]
                wrapped = MiniMindVProcessor(image_processor(summary.config, vision_encoder), wrapped, length, token)
            wrapped.save_pretrained(folder)
        progress.update()
    return output


def local_path(source: str | Path) -> bool:
    """Whether this names a file or folder here, and not a Hub repository (`user/name`)."""
    is_repository = re.fullmatch(
        r"[\w.-]+/[\w.-]+(?<!\.pth)(?<!\.pt)(?<!\.bin)(?<!\.safetensors)(?<!\.json)", str(source)
    )
    return Path(source).expanduser().exists() or not is_repository


def read_checkpoint(checkpoint: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path | None]:
    """Tensors, original arguments if a folder names them, and the folder. Pickles are read with weights_only=True."""
    path, arguments = Path(checkpoint), {}
    if path.is_file():
        return read_tensors(path), arguments, None
    if not path.is_dir():
        if local_path(checkpoint):
            raise FileNotFoundError(f"{checkpoint} is no file, no folder and no Hub repository (user/name).")
        path = Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.txt"]))
    if (path / "config.json").exists():
        arguments = read_json(path / "config.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / f"{name}.index.json").exists():
            shards = sorted(set(read_json(path / f"{name}.index.json")["weight_map"].values()))
            return {k: v for shard in shards for k, v in read_tensors(path / shard).items()}, arguments, path
        if (path / name).exists():
            return read_tensors(path / name), arguments, path
    raise FileNotFoundError(f"{path} has neither model.safetensors nor pytorch_model.bin.")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zip_file(path))
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint makes the readers fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # the original's files for resuming also hold the optimizer
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise ValueError(
            f"{path} does not hold a state dict (names and tensors); it holds a {type(content).__name__}."
        )
    # Prefixes that torch.compile and DistributedDataParallel leave
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor.contiguous() for name, tensor in content.items()}


def zip_file(path: Path) -> bool:
    """Whether the tensors can stay on disk until they are used (the form that torch writes since 1.6)."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def drop_ignored(state: dict[str, torch.Tensor], summary: Summary) -> dict[str, torch.Tensor]:
    reasons = {name: ignored_reason(name) for name in state}
    for reason in sorted({reason for reason in reasons.values() if reason}):
        count = sum(value == reason for value in reasons.values())
        summary.notes.append(f"ignored {count} tensors: {reason}")
    return {name: tensor for name, tensor in state.items() if not reasons[name]}


def untie(state: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Drops the output matrix where it is the embedding; the original saves both."""
    head, embedding = state.get("lm_head.weight"), state[LANGUAGE_MODEL + "embed_tokens.weight"]
    if not config.tie_word_embeddings:
        return state
    if head is not None and not torch.equal(head, embedding):
        raise ValueError(
            "The output matrix differs from the embedding, but the configuration ties them. If they were trained "
            'apart, say so with --config: {"tie_word_embeddings": false}.'
        )
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


def read_tower(
    shapes: dict[str, torch.Size] | None, vision_encoder: str | Path | None
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor], list[str]]:
    """Configuration of the tower, its tensors unless the checkpoint has them (`shapes`), and what was assumed."""
    if vision_encoder is None:
        if shapes is None:
            raise ValueError(
                "The checkpoint has no vision tower. Name its folder or repository with --vision-encoder."
            )
        config, assumed = vision_config(shapes)
        return config, {}, assumed
    config = AutoConfig.from_pretrained(vision_encoder)
    if config.model_type not in TOWERS:
        raise ValueError(f"{vision_encoder} must be a CLIP or SigLIP model; it is a {config.model_type!r}.")
    if config.model_type in ("clip", "siglip"):
        config = config.vision_config
    if shapes is not None:
        return without_head(config), {}, []
    tower = TOWERS[config.model_type].from_pretrained(vision_encoder, config=config).state_dict()
    tower = {re.sub(r"^vision_model\.", "", name): tensor for name, tensor in tower.items()}
    tower = {TOWER + name: tensor for name, tensor in tower.items() if not name.startswith("head.")}
    return without_head(config), tower, []


def without_head(config: PreTrainedConfig) -> PreTrainedConfig:
    """SigLIP's pooling head is not used: the decoder reads the patches."""
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    return config


def vision_language_config(decoder: PreTrainedConfig, tower: PreTrainedConfig) -> MiniMindVConfig:
    return MiniMindVConfig(
        text_config=decoder,
        vision_config=tower,
        image_token_id=IMAGE_TOKEN_IDS[decoder.original_generation],
        projector_type="mlp" if decoder.original_generation == "minimind3" else "linear",
    )


def fill_model(
    model_class: type, config: PreTrainedConfig, state: dict[str, torch.Tensor], fresh_projector: bool
) -> MiniMindForCausalLM | MiniMindVForConditionalGeneration:
    """The model with exactly these tensors, or a ValueError that lists what does not fit."""
    with torch.device("meta"):
        model = model_class(config)
    if fresh_projector and model_class is MiniMindVForConditionalGeneration:
        projector = MiniMindVMultiModalProjector(config)
        projector.apply(model._init_weights)
        state |= {PROJECTOR + name: tensor for name, tensor in projector.state_dict().items()}
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


def shorten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def image_processor(config: MiniMindVConfig, vision_encoder: str | Path | None) -> Any:
    """The tower's own image processor, or the usual one of its family."""
    if vision_encoder is not None:
        with contextlib.suppress(OSError):
            return AutoImageProcessor.from_pretrained(vision_encoder, backend="pil")
    side = config.vision_config.image_size
    if config.vision_config.model_type == "clip_vision_model":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    half = [0.5, 0.5, 0.5]
    return SiglipImageProcessorPil(size={"height": side, "width": side}, resample=2, image_mean=half, image_std=half)
