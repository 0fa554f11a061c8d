"""Checkpoints of this package -> GGUF files for llama.cpp and Ollama."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig

from ..common import atomic_output, load_processor
from .llama_cpp_check import check_with_llama_cpp
from .ollama import modelfile
from .reading import read_own_checkpoint
from .summary import Summary

INSTEAD = "serve the checkpoint with vLLM or transformers serve"


def export_gguf(
    checkpoint: str | Path, output: str | Path, *, precision: str = "q8_0", overwrite: bool = False, check: bool = True
) -> Summary:
    """Writes a folder for llama.cpp and Ollama: the decoder, of MiniMind-3 also tower and projector, and a Modelfile.

    Args:
        checkpoint: Folder of this package, with or without a tower, with a tokenizer.
        output: Folder to write.
        precision: Of the decoder's matrices: `"f32"`, `"f16"`, `"q8_0"` or `"q4_0"`. Tower and projector are float32
            with the first and float16 with the others.
        overwrite: Replace an existing folder.
        check: Ask both three questions, where llama-cpp-python is installed; with float32, refuse to write what
            answers differently.

    Returns:
        What was written and checked.

    Raises:
        AnswersDifferError: The output does not answer as the checkpoint.
        FileExistsError: The output exists and is not empty.
        ImportError: The library gguf is missing.
        ValueError: Not a checkpoint of this package, without a tokenizer, or nothing in llama.cpp computes the same.
    """
    try:
        from gguf import GGMLQuantizationType

        from .gguf_files import write_decoder, write_tower
    except ImportError as error:
        raise ImportError("GGUF needs the library gguf: pip install 'minimind-v[export]'") from error
    state, config = read_own_checkpoint(checkpoint)
    if reason := decoder_obstacle(config.get_text_config()):
        raise ValueError(f"llama.cpp cannot run this decoder: {reason}. Instead, {INSTEAD}.")
    if not Path(checkpoint, "tokenizer.json").exists():
        raise ValueError(f"{checkpoint} has no tokenizer.json, which a GGUF file contains. Put the tokenizer there.")
    obstacle = tower_obstacle(config)
    kind, output, name = GGMLQuantizationType[precision.upper()], Path(output), Path(checkpoint).resolve().name
    tower_kind = min(kind, GGMLQuantizationType.F16)
    model, tower = f"model-{kind.name}.gguf", None if obstacle else f"mmproj-{tower_kind.name}.gguf"
    processor = load_processor(checkpoint) if tower else None
    tokenizer = (
        processor.tokenizer if processor else AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    )
    notes = []
    with atomic_output(output, overwrite) as folder:
        folder.mkdir()
        unquantized = write_decoder(folder / model, name, state, config, tokenizer, kind)
        if unquantized:
            notes.append(
                f"{len(unquantized)} matrices are F16: their rows are no multiple of 32, as {kind.name} needs."
            )
        if processor:
            write_tower(folder / tower, name, state, config, processor.image_processor, tower_kind)
            notes += image_notes(processor.image_processor)
        elif obstacle:
            notes.append(f"Without the tower, so for text only: {obstacle}. For images, {INSTEAD}.")
        if text := modelfile([model, tower] if tower else [model], tokenizer, config.get_text_config()):
            (folder / "Modelfile").write_text(text, encoding="utf-8")
            notes.append(
                "The Modelfile is written by Ollama's documentation and was not run (ollama create NAME -f Modelfile). "
                "Ollama does not use the chat template's guard: control tokens that a user types act there."
            )
        checked = "no, as asked for"
        if check:
            checked = check_with_llama_cpp(checkpoint, folder / model, tower and folder / tower, kind.name == "F32")
    form = f"GGUF for llama.cpp and Ollama, {'with' if tower else 'without'} tower and projector"
    return Summary(
        output, form, kind.name + (f", tower and projector {tower_kind.name}" if tower else ""), checked, notes
    )


def decoder_obstacle(text: PreTrainedConfig) -> str | None:
    """Which switch of a decoder llama.cpp cannot follow, if one."""
    rope, obstacles = text.rope_parameters["rope_type"], []
    if text.use_moe:
        sparse = range(text.decoder_sparse_step - 1, text.num_hidden_layers, text.decoder_sparse_step)
        obstacles = [
            (text.num_shared_experts, f"num_shared_experts is {text.num_shared_experts}, its qwen3moe has none"),
            (not text.use_qk_norm, "use_qk_norm is false, its qwen3moe always has q/k norm"),
            (
                not text.norm_topk_prob,
                "norm_topk_prob is false, its qwen3moe lets a token's weights always sum up to 1",
            ),
            (
                len(set(sparse) - set(text.mlp_only_layers)) < text.num_hidden_layers,
                "decoder_sparse_step or mlp_only_layers leave layers dense, its qwen3moe has experts in all",
            ),
        ]
    obstacles += [
        (rope != "default", f"rope_parameters has rope_type {rope!r}, which it computes differently"),
        (text.hidden_act != "silu", f"hidden_act is {text.hidden_act!r}, it has silu there"),
        (text.attention_bias, "attention_bias is true"),
    ]
    return next((reason for is_in_the_way, reason in obstacles if is_in_the_way), None)


def tower_obstacle(config: PreTrainedConfig) -> str | None:
    """Why llama.cpp cannot have tower and projector of a checkpoint; None if it can."""
    if config.model_type == "minimind":
        return "the checkpoint has none"
    tower, size = config.vision_config, config.projector_merge_size
    obstacles = [
        (
            tower.model_type == "clip_vision_model",
            "vision_config is a clip_vision_model, of whose rows llama.cpp drops another one than CLS",
        ),
        (
            tower.model_type != "siglip_vision_model",
            f"vision_config is a {tower.model_type} (NaFlex), and llama.cpp has no such tower with this projector",
        ),
        (size > 1, f"projector_merge_size is {size}, and llama.cpp merges no patches before this projector"),
        (config.projector_type != "mlp", f"projector_type is {config.projector_type!r} instead of 'mlp'"),
        (not config.projector_norm, "projector_norm is false, and llama.cpp would need it"),
        ("gelu" not in config.projector_hidden_act, f"projector_hidden_act is {config.projector_hidden_act!r}"),
        (
            getattr(tower, "hidden_act", None) != "gelu_pytorch_tanh",
            "vision_config.hidden_act is not gelu_pytorch_tanh",
        ),
    ]
    return next((reason for is_in_the_way, reason in obstacles if is_in_the_way), None)


def image_notes(image_processor: object) -> list[str]:
    """How llama.cpp prepares images otherwise than the checkpoint's processor."""
    notes = ["llama.cpp pads an image that is not square with grey, where the checkpoint's processor stretches it."]
    if image_processor.resample != 3:
        notes.append("llama.cpp resizes images bicubically, where the checkpoint's processor does it bilinearly.")
    return notes
