"""Configurations of MiniMind-V: `MiniMindConfig` for the decoder, `MiniMindVConfig` for tower + projector + decoder.

The decoder extends `Qwen3MoeConfig`: MiniMind-3 *is* Qwen3 or Qwen3-MoE, MiniMind2 has shared experts, no q/k norm.
"""

import copy
import math
from typing import Any, Literal

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19):
    raise ImportError(f"MiniMind-V needs transformers >= 5.19.0, not {transformers.__version__}: install a newer one.")
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import strict  # checks the types, then calls validate_architecture
from transformers.models.auto import modeling_auto
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from .vision_tower_minimind_v import count_image_tokens, vision_tower_config

# Pipelines and `transformers serve` look a model's class up in these tables, before they import its file.
TEXT, VISION = {"minimind": "MiniMindForCausalLM"}, {"minimind_v": "MiniMindVForConditionalGeneration"}
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(TEXT | VISION)
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.update(TEXT | VISION)
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.update(VISION)


@strict
class MiniMindConfig(Qwen3MoeConfig):
    """Configuration of the MiniMind decoder. Without arguments: the dense decoder of MiniMind-3 (65M parameters).

    Args:
        use_moe: Experts instead of a dense FFN, save in layers excepted by `mlp_only_layers` or `decoder_sparse_step`.
        use_qk_norm: RMSNorm on each head's query and key before RoPE (MiniMind-3: yes, MiniMind2: no).
        num_shared_experts: Experts that see every token besides the routed ones (MiniMind2), as one FFN of their sum.
        router_aux_loss_type: Formula of [`router_auxiliary_loss`]: `"switch"` (MiniMind-3), `"sequence"` or `"batch"`.
        head_dim, intermediate_size, moe_intermediate_size: Left out, `hidden_size // num_attention_heads`; for a dense
            FFN MiniMind-3's rule `64 * ceil(pi * hidden_size / 64)`; for an expert `intermediate_size`.
        norm_topk_prob: Weights of a token's experts sum up to 1; with one expert, as released, its weight is always 1.
    """

    model_type = "minimind"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]
    default_theta = 1_000_000.0

    vocab_size: int = 6400
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = None
    tie_word_embeddings: bool = True
    use_qk_norm: bool = True
    use_moe: bool = False
    num_experts: int = 4
    num_experts_per_tok: int = 1
    num_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 5e-4
    router_aux_loss_type: Literal["switch", "sequence", "batch"] = "switch"
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 64 * math.ceil(math.pi * self.hidden_size / 64)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        self.rope_parameters = copy.copy(self.rope_parameters)  # the library completes it in place
        super().__post_init__(**kwargs)
        every_step = range(self.decoder_sparse_step - 1, self.num_hidden_layers, self.decoder_sparse_step)
        sparse_layers = set(every_step) - set(self.mlp_only_layers) if self.use_moe else ()
        self.use_moe = len(sparse_layers) > 0
        if not self.use_moe:
            self.num_experts = 0  # so Qwen3-MoE's layers, and vLLM, know that the decoder is dense
            self.router_aux_loss_coef = 0.0  # TRL asks every model that has this field, and not 0, for its router loss
        absent = [part for part, has in (("_norm", self.use_qk_norm), (".experts", self.use_moe)) if not has]
        absent += ["mlp.gate_p", "mlp.up_p", "mlp.down_p"] if len(sparse_layers) == self.num_hidden_layers else []
        plan = self.base_model_tp_plan  # must not name what no layer has
        self.base_model_tp_plan = {k: v for k, v in plan.items() if not any(part in k for part in absent)}

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"{heads} must be a multiple of num_key_value_heads ({self.num_key_value_heads}).")
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim must be even for RoPE, which rotates pairs; got {self.head_dim}.")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok must be 1 to {self.num_experts}; got {self.num_experts_per_tok}.")

    def to_dict(self) -> dict[str, Any]:
        """Without what a dense decoder has no use for (vLLM takes a count of experts for experts)."""
        output = super().to_dict()
        of_experts = ("expert", "moe_", "router_", "topk", "mlp_only", "sparse")
        if not self.use_moe:
            output = {name: value for name, value in output.items() if not any(word in name for word in of_experts)}
        output["auto_map"] = {
            "AutoConfig": "configuration_minimind_v.MiniMindConfig",
            "AutoModel": "modeling_minimind_v.MiniMindModel",
            "AutoModelForCausalLM": "modeling_minimind_v.MiniMindForCausalLM",
            "AutoModelForMultimodalLM": "modeling_minimind_v.MiniMindForCausalLM",
        }
        return output


@strict
class MiniMindVConfig(PreTrainedConfig):
    """Configuration of MiniMind-V. Without any argument: MiniMind-3V as released.

    Args:
        text_config: `MiniMindConfig` or a dict of its fields.
        vision_config: Configuration of a CLIP, SigLIP or SigLIP2 (NaFlex) tower, or a dict with its `model_type`.
        image_token_id: Id of the placeholder `<|image_pad|>` in `input_ids`; left out, the one of MiniMind-3.
        image_seq_length: Tokens of one image; left out, what the tower produces.
        projector_type: `"mlp"` (MiniMind-3: LayerNorm, Linear, exact GELU, Linear) or `"linear"` (MiniMind2).
        projector_norm: Whether `"mlp"` begins with the LayerNorm.
        projector_merge_size, projector_merge_order: Patches per token, in `"sequence"` or as a square `"block"`.
        vision_feature_select_strategy: `"default"` drops CLS (left out, for CLIP), `"full"` keeps all (for SigLIP).
        tie_word_embeddings: Embedding and output matrix are one tensor; left out, as `text_config` says.
    """

    model_type = "minimind_v"
    sub_configs = {"text_config": MiniMindConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss", "image_hidden_states"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 12
    image_seq_length: int | None = None
    projector_type: Literal["linear", "mlp"] = "mlp"
    projector_hidden_act: str = "gelu"
    projector_norm: bool = True
    projector_merge_size: int = 1
    projector_merge_order: Literal["sequence", "block"] = "sequence"
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = MiniMindConfig(**copy.deepcopy(self.text_config or {}))
        if getattr(self.text_config, "original_generation", "").startswith("minimind2"):
            made = "was converted by an earlier version, which wrote an image as 196 times '@'"
            raise ValueError(f"This checkpoint {made}. Convert the original's weights again (minimind-v convert).")
        self.vision_config = vision_tower_config(self.vision_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        elif self.tie_word_embeddings != self.text_config.tie_word_embeddings:
            self.text_config = copy.deepcopy(self.text_config)
            self.text_config.tie_word_embeddings = self.tie_word_embeddings
        strategy = "default" if self.vision_config.model_type == "clip_vision_model" else "full"
        self.vision_feature_select_strategy = self.vision_feature_select_strategy or strategy
        self.image_seq_length = self.image_seq_length or count_image_tokens(self)
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)  # with it, `pipeline` asks an installed package for trust_remote_code
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.vision_feature_select_strategy == "default" and self.vision_config.model_type != "clip_vision_model":
            raise ValueError("vision_feature_select_strategy must be 'full': the tower has no CLS token to drop.")
        if not 0 <= self.image_token_id < (size := self.text_config.vocab_size):
            raise ValueError(f"image_token_id must be an id below vocab_size ({size}); got {self.image_token_id}.")
        if self.image_seq_length != (produced := count_image_tokens(self)):
            raise ValueError(f"image_seq_length must be {produced}, as the tower makes; got {self.image_seq_length}.")

    def to_dict(self) -> dict[str, Any]:
        """With what lets the saved checkpoint load by itself: `auto_map`, and the image-to-text pipeline."""
        output = super().to_dict()
        for name in self.sub_configs:  # as the library sets it on loading, so that saving again changes nothing
            output[name]["dtype"] = output.get("dtype")
        output.pop("use_cache", None)  # Trainer turns it off while it trains
        heads = [f"AutoModelFor{kind}" for kind in ("CausalLM", "ImageTextToText", "MultimodalLM")]
        output["auto_map"] = dict.fromkeys(heads, "modeling_minimind_v.MiniMindVForConditionalGeneration") | {
            "AutoConfig": "configuration_minimind_v.MiniMindVConfig",
            "AutoModel": "modeling_minimind_v.MiniMindVModel",
            "AutoProcessor": "processing_minimind_v.MiniMindVProcessor",
        }
        pipeline = {"impl": "processing_minimind_v.MiniMindVImageToTextPipeline", "type": "multimodal"}
        output["custom_pipelines"] = {"image-to-text": pipeline | {"pt": ["AutoModelForImageTextToText"]}}
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: without the labels of classifiers, which the library gives every part."""
        output = super().to_diff_dict()
        for name in self.sub_configs:
            output[name] = {key: value for key, value in output[name].items() if key not in ("id2label", "label2id")}
        return output


# Registration makes save_pretrained copy this file, and those it imports, next to the weights.
MiniMindConfig.register_for_auto_class()
MiniMindVConfig.register_for_auto_class()

__all__ = ["MiniMindConfig", "MiniMindVConfig"]
