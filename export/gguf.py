"""Checkpoints of this package -> GGUF files for llama.cpp and Ollama."""

from collections.abc import Iterator
from pathlib import Path

import PIL.Image
from transformers import AutoTokenizer, PreTrainedConfig

from ..common import atomic_output, load_processor
from .llama_cpp_check import check_with_llama_cpp
from .ollama import modelfile
from .reading import read_own_checkpoint
from .summary import Summary

INSTEAD = "Serve the checkpoint with vLLM or transformers serve instead."


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
        ValueError: Not a checkpoint of this package, without a tokenizer, or llama.cpp cannot run its decoder.
    """
    try:
        from gguf import GGMLQuantizationType

        from .gguf_files import write_decoder, write_tower
    except ImportError as error:
        raise ImportError("GGUF needs the library gguf: pip install 'minimind-v[export]'") from error
    state, config = read_own_checkpoint(checkpoint)
    text, has_tower = config.get_text_config(), config.model_type == "minimind_v"
    if obstacle := next(decoder_obstacles(text), None):
        raise ValueError(f"llama.cpp cannot run this decoder: {obstacle}. {INSTEAD}")
    has_tokenizer = Path(checkpoint, "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False) if has_tokenizer else None
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(f"{checkpoint} lacks tokenizer.json or its chat template, which a GGUF file holds. Add them.")
    notes, output, name = [], Path(output), Path(checkpoint).resolve().name
    if has_tower and (obstacles := list(tower_obstacles(config))):
        has_tower = False
        notes.append(f"Without the tower, so for text only: {'; '.join(obstacles)}. {INSTEAD}")
    kind = GGMLQuantizationType[precision.upper()]
    tower_kind = kind if kind == GGMLQuantizationType.F32 else GGMLQuantizationType.F16
    checked = "no, as asked for"
    with atomic_output(output, overwrite) as folder:
        folder.mkdir()
        files = [folder / f"model-{kind.name}.gguf"]
        unquantized = write_decoder(files[0], name, state, config, tokenizer, kind)
        if unquantized:
            notes.append(f"F16 instead of {kind.name}: {len(unquantized)} matrices whose rows are no multiple of 32.")
        if has_tower:
            files.append(folder / f"mmproj-{tower_kind.name}.gguf")
            image_processor = load_processor(checkpoint).image_processor
            write_tower(files[1], name, state, config, image_processor, tower_kind)
            notes.append(
                "llama.cpp pads an image that is not square with grey, the checkpoint's processor stretches it."
            )
            if image_processor.resample != PIL.Image.Resampling.BICUBIC:
                notes.append("llama.cpp resizes images bicubically, the checkpoint's processor in another way.")
        if ollama := modelfile([file.name for file in files], tokenizer, text):
            (folder / "Modelfile").write_text(ollama, encoding="utf-8")
            notes.append(
                "The Modelfile follows Ollama's documentation and was not run: ollama create NAME -f Modelfile."
            )
            if has_tower:
                notes.append("Its second FROM, for images, is not in that documentation: some versions refuse it.")
            notes.append("Ollama does not run the chat template's guard: control tokens that a user types act there.")
        if check:
            checked = check_with_llama_cpp(checkpoint, files, text.max_position_embeddings, kind.name == "F32")
    parts = "decoder, tower and projector" if has_tower else "decoder"
    precisions = f"{kind.name}, tower and projector {tower_kind.name}" if has_tower else kind.name
    return Summary(output, f"GGUF for llama.cpp and Ollama: {parts}", precisions, checked, notes)


def decoder_obstacles(text: PreTrainedConfig) -> Iterator[str]:
    """The switches of a decoder that llama.cpp cannot follow."""
    if (rope := text.rope_parameters["rope_type"]) != "default":
        yield f"rope_parameters has rope_type {rope!r}, which it computes in another way"
    if text.hidden_act != "silu":
        yield f"hidden_act is {text.hidden_act!r} instead of 'silu'"
    if text.attention_bias:
        yield "attention_bias is true"
    if text.use_sliding_window:
        yield "use_sliding_window is true"
    if not text.use_moe:
        return
    if text.num_shared_experts:
        yield f"num_shared_experts is {text.num_shared_experts}, and its qwen3moe has none"
    if not text.use_qk_norm:
        yield "use_qk_norm is false, and its qwen3moe always has q/k norm"
    if not text.norm_topk_prob:
        yield "norm_topk_prob is false, and its qwen3moe always normalises"
    if text.decoder_sparse_step > 1 or text.mlp_only_layers:
        yield "decoder_sparse_step or mlp_only_layers except layers, and its qwen3moe has experts in all"


def tower_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """The switches of tower and projector that llama.cpp cannot follow."""
    tower, size = config.vision_config, config.projector_merge_size
    if tower.model_type == "clip_vision_model":
        yield "vision_config is a clip_vision_model, from whose rows llama.cpp drops another one than CLS"
    elif tower.model_type != "siglip_vision_model":
        yield f"vision_config is a {tower.model_type}, and llama.cpp has this projector for siglip_vision_model only"
    elif tower.hidden_act != "gelu_pytorch_tanh":
        yield f"vision_config.hidden_act is {tower.hidden_act!r} instead of 'gelu_pytorch_tanh'"
    if size > 1:
        yield f"projector_merge_size is {size}, and llama.cpp merges no patches before this projector"
    if config.projector_type != "mlp":
        yield f"projector_type is {config.projector_type!r} instead of 'mlp'"
    if not config.projector_norm:
        yield "projector_norm is false"
    if config.projector_hidden_act != "gelu":
        yield f"projector_hidden_act is {config.projector_hidden_act!r} instead of 'gelu'"
