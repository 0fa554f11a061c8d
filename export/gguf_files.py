"""The two GGUF files of a checkpoint: its decoder with the tokenizer, and its tower with the projector (mmproj)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from tqdm import tqdm
from transformers import PreTrainedConfig

from ..conversion.key_maps import LANGUAGE_MODEL, PROJECTOR, QUERY_OR_KEY, TOWER

State = dict[str, torch.Tensor]
QUANTIZED = (Type.Q8_0, Type.Q4_0)
BLOCK = 32  # both quantise so many neighbours of a row with one scale


# --- The decoder -----------------------------------------------------------------------------------------------------


def architecture(text: PreTrainedConfig) -> str:
    """llama.cpp's name of the decoder."""
    return "qwen3moe" if text.use_moe else "qwen3" if text.use_qk_norm else "llama"


def write_decoder(
    file: Path, name: str, state: State, config: PreTrainedConfig, tokenizer: Any, precision: Type
) -> set[str]:
    """Writes decoder, tokenizer and chat template.

    Args:
        file: Where to.
        name: Of the model, for people.
        state: Tensors under the vision-language model's names, `lm_head.weight` among them.
        config: Of the checkpoint.
        tokenizer: A fast tokenizer of byte-level BPE.
        precision: Of the matrices.

    Returns:
        Names of the matrices that are float16 because their rows cannot be quantised.
    """
    text = config.get_text_config()
    writer = gguf.GGUFWriter(file, architecture(text))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if precision == Type.F32 else 'MOSTLY'}_{precision.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    if text.use_moe:
        writer.add_expert_count(text.num_experts)
        writer.add_expert_used_count(text.num_experts_per_tok)
        writer.add_expert_feed_forward_length(text.moe_intermediate_size)
    add_tokenizer(writer, tokenizer, text.vocab_size)
    if config.model_type == "minimind_v":  # llama.cpp's own programs never choose it, as our generation_config.json
        writer.add_array("tokenizer.ggml.suppress_tokens", [config.image_token_id])

    unquantized = set()

    def type_of(tensor_name: str, tensor: torch.Tensor) -> Type:
        if tensor.ndim == 1 or "ffn_gate_inp" in tensor_name:
            return Type.F32  # llama.cpp wants norms so; a rounded router would send tokens to other experts
        if precision in QUANTIZED and tensor.shape[-1] % BLOCK:
            unquantized.add(tensor_name)
            return Type.F16
        if precision == Type.Q4_0 and tensor_name in ("token_embd.weight", "output.weight"):
            return Type.Q8_0  # they decide between tokens; llama.cpp's own quantiser spends more bits on them as well
        return precision

    write_tensors(writer, dict(decoder_tensors(state, text)), type_of)
    return unquantized


def decoder_tensors(state: State, text: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The decoder's tensors under llama.cpp's names and in its order of rows."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture(text).upper()], text.num_hidden_layers)
    for name, tensor in state.items():
        stem = name.removesuffix(".weight").replace(LANGUAGE_MODEL, "model.")
        if name.startswith((TOWER, PROJECTOR)) or (name == "lm_head.weight" and text.tie_word_embeddings):
            continue
        if stem.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield names[stem.replace("gate_up", "gate")] + ".weight", gate
            yield names[stem.replace("gate_up", "up")] + ".weight", up
            continue
        if architecture(text) == "llama" and QUERY_OR_KEY.fullmatch(name):
            # RoPE rotates the pairs (i, i + d/2) of a head here, and (2i, 2i + 1) in llama.cpp's Llama
            tensor = tensor.unflatten(0, (-1, 2, text.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        yield names[stem] + ".weight", tensor


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """The vocabulary, in which no text of a user becomes a control token.

    Raises:
        ValueError: The tokenizer is not that of GPT-2 with another vocabulary, as those of all releases are.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    before = content["pre_tokenizer"] or {}
    is_known = before.get("type") == "ByteLevel" and before.get("use_regex") and not before.get("add_prefix_space")
    if content["model"]["type"] != "BPE" or content["normalizer"] or not is_known:
        raise ValueError(
            "The tokenizer is not byte-level BPE that splits text as GPT-2's does, which is what this export writes. "
            "Use the tokenizer of a release."
        )
    tokens, types = [f"[UNUSED{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer.get_vocab().items():
        added = tokenizer.added_tokens_decoder.get(i)
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
        if added:
            types[i] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


# --- Tower and projector ---------------------------------------------------------------------------------------------


def write_tower(file: Path, name: str, state: State, config: PreTrainedConfig, pixels: Any, precision: Type) -> None:
    """Writes tower and projector of MiniMind-3 as those of Janus Pro, the model nearest to it in llama.cpp.

    Args:
        file: Where to.
        name: Of the model, for people.
        state: Tensors under the vision-language model's names.
        config: Of the checkpoint.
        pixels: The image processor: mean and standard deviation of its pixels.
        precision: Of the matrices in the blocks and the projector, float32 or float16.
    """
    tower = config.vision_config
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == Type.F32 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("janus_pro")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(tower.num_hidden_layers + 1)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_image_mean(pixels.image_mean)
    writer.add_vision_image_std(pixels.image_std)
    writer.add_vision_use_gelu(True)  # its tanh form, in projector and tower
    extra = f"v.blk.{tower.num_hidden_layers}."

    def type_of(tensor_name: str, tensor: torch.Tensor) -> Type:
        is_exact = (
            tensor.ndim != 2 or tensor_name.startswith("v.position_embd") or tensor_name.startswith(extra + "ffn")
        )
        return Type.F32 if is_exact else precision

    write_tensors(writer, dict(tower_tensors(state, config)), type_of)


def tower_tensors(state: State, config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of tower and projector under llama.cpp's names."""
    layers = config.vision_config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for name, tensor in state.items():
        if name.startswith((TOWER + "embeddings.", TOWER + "encoder.")):  # not the pooling head, which has no use
            stem, _, kind = name.replace(TOWER, "vision_tower.vision_model.").rpartition(".")
            yield f"{names[stem]}.{kind}", tensor
    weight, bias = (state[f"{TOWER}post_layernorm.{kind}"] for kind in ("weight", "bias"))
    yield from norm_as_block(f"v.blk.{layers}.", weight, bias)
    for old, new in {"norm": "v.post_ln", "linear_1": "mm.0", "linear_2": "mm.1"}.items():
        for kind in ("weight", "bias"):
            yield f"{new}.{kind}", state[f"{PROJECTOR}{old}.{kind}"]


def norm_as_block(block: str, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformer block that is a LayerNorm: `post_layernorm`, since llama.cpp has one norm only after the blocks.

    That one is the projector's. A block computes `x + down(gelu(up(norm(x))))` when its attention is zero. With `up` =
    [I, -I] and `down` = [I, -I] its FFN is the identity, for gelu(z) - gelu(-z) = z. The scale of 2^18 makes `x`
    vanish beside it, and the projector's norm undoes it. With `x` vanishes that norm's eps of 1e-5: where the features
    have a variance of v, they come out larger by 1e-5 / 2v. 2^8 of the 2^18 stand before gelu, because llama.cpp's
    table of it is exact for large numbers only.
    """
    width = len(weight)
    identity, zero = torch.eye(width), torch.zeros(width, width)
    for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
        yield f"{block}{part}.weight", zero
    for norm in ("ln1", "ln2"):
        yield f"{block}{norm}.weight", weight
        yield f"{block}{norm}.bias", bias
    yield f"{block}ffn_up.weight", torch.cat([identity, -identity]) * 2**8
    yield f"{block}ffn_down.weight", torch.cat([identity, -identity], dim=1) * 2**10


# --- Both ------------------------------------------------------------------------------------------------------------


def write_tensors(writer: gguf.GGUFWriter, tensors: State, type_of: Callable[[str, torch.Tensor], Type]) -> None:
    """Writes the file: what the writer knows already, and the tensors in the types that `type_of` says."""
    for name, tensor in tqdm(tensors.items(), desc="writing GGUF", unit="tensor", leave=False, disable=None):
        kind = type_of(name, tensor)
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
