"""Checkpoints of this package -> GGUF files for llama.cpp and Ollama."""

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
        ValueError: Not a checkpoint of this package, without a tokenizer, or nothing in llama.cpp computes the same.
    """
    try:
        from gguf import GGMLQuantizationType

        from .gguf_files import write_decoder, write_tower
    except ImportError as error:
        raise ImportError("GGUF needs the library gguf: pip install 'minimind-v[export]'") from error
    state, config = read_own_checkpoint(checkpoint)
    text, has_tower = config.get_text_config(), config.model_type == "minimind_v"
    if obstacle := decoder_obstacle(text):
        raise ValueError(f"llama.cpp cannot run this decoder: {obstacle}. {INSTEAD}")
    if not Path(checkpoint, "tokenizer.json").exists():
        raise ValueError(f"{checkpoint} has no tokenizer.json, which a GGUF file contains. Put the tokenizer there.")
    notes, output, name = [], Path(output), Path(checkpoint).resolve().name
    if has_tower and (obstacle := tower_obstacle(config)):
        has_tower = False
        notes.append(f"Without the tower, so for text only: {obstacle}. {INSTEAD}")
    kind = GGMLQuantizationType[precision.upper()]
    tower_kind = min(kind, GGMLQuantizationType.F16)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
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
                "The Modelfile (ollama create NAME -f Modelfile) follows Ollama's documentation, it was not run."
            )
            notes.append("Ollama does not run the chat template's guard: control tokens that a user types act there.")
        if check:
            checked = check_with_llama_cpp(checkpoint, files, text.max_position_embeddings, kind.name == "F32")
    parts = "decoder, tower and projector" if has_tower else "decoder"
    precisions = f"{kind.name}, tower and projector {tower_kind.name}" if has_tower else kind.name
    return Summary(output, f"GGUF for llama.cpp and Ollama: {parts}", precisions, checked, notes)


def decoder_obstacle(text: PreTrainedConfig) -> str | None:
    """Which switch of a decoder llama.cpp cannot follow; None if it can follow all."""
    rope = text.rope_parameters["rope_type"]
    obstacles = {
        f"rope_parameters has rope_type {rope!r}, which it computes in another way": rope != "default",
        f"hidden_act is {text.hidden_act!r} instead of 'silu'": text.hidden_act != "silu",
        "attention_bias is true": text.attention_bias,
        "use_sliding_window is true": text.use_sliding_window,
    }
    if text.use_moe:
        shared, sparse = (
            text.num_shared_experts,
            range(text.num_hidden_layers)[text.decoder_sparse_step - 1 :: text.decoder_sparse_step],
        )
        obstacles |= {
            f"num_shared_experts is {shared}, and its qwen3moe has none": shared,
            "use_qk_norm is false, and its qwen3moe always has q/k norm": not text.use_qk_norm,
            "norm_topk_prob is false, and its qwen3moe always normalises": not text.norm_topk_prob,
            "decoder_sparse_step or mlp_only_layers make layers dense, and its qwen3moe has experts in all": (
                len(set(sparse) - set(text.mlp_only_layers)) < text.num_hidden_layers
            ),
        }
    return next((reason for reason, is_there in obstacles.items() if is_there), None)


def tower_obstacle(config: PreTrainedConfig) -> str | None:
    """Which switch of tower and projector llama.cpp cannot follow; None if it can follow all."""
    tower, size = config.vision_config, config.projector_merge_size
    activation = getattr(tower, "hidden_act", None)
    obstacles = {
        "vision_config is a clip_vision_model, from whose rows llama.cpp drops another one than CLS": (
            tower.model_type == "clip_vision_model"
        ),
        f"vision_config is a {tower.model_type} and not a siglip_vision_model, and projector_merge_size is {size}": (
            tower.model_type != "siglip_vision_model"
        ),
        f"projector_merge_size is {size}, and llama.cpp merges no patches before this projector": size > 1,
        f"projector_type is {config.projector_type!r} instead of 'mlp'": config.projector_type != "mlp",
        "projector_norm is false": not config.projector_norm,
        f"projector_hidden_act is {config.projector_hidden_act!r} instead of 'gelu'": config.projector_hidden_act
        != "gelu",
        f"vision_config.hidden_act is {activation!r} instead of 'gelu_pytorch_tanh'": activation
        != "gelu_pytorch_tanh",
    }
    return next((reason for reason, is_there in obstacles.items() if is_there), None)
