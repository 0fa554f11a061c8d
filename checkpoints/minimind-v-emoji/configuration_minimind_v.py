"""Configurations of MiniMind-V: `MiniMindConfig` for the decoder, `MiniMindVConfig` for tower + projector + decoder.

The decoder's fields carry the names of `Qwen3MoeConfig`, which it extends: MiniMind-3 *is* Qwen3 (dense) or Qwen3-MoE
(experts) with other sizes, and MiniMind2 is the same without q/k norm, with always-on shared experts.
"""

import math
import re
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import strict  # checks the type of every field
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig


def check_choice(config: PreTrainedConfig, name: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError unless the field has one of these values."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} must be one of {choices}; got {getattr(config, name)!r}.")


@strict
class MiniMindConfig(Qwen3MoeConfig):
    """Configuration of the MiniMind decoder. Without arguments: the dense decoder of MiniMind-3 (65M parameters).

    Only what `Qwen3MoeConfig` does not have, or has with another default, is listed here.

    Args:
        use_moe: Mixture of experts in every layer (the original's own switch) instead of one dense FFN.
        use_qk_norm: RMSNorm on each head's query and key before RoPE (MiniMind-3: yes, MiniMind2: no).
        num_shared_experts: Experts that see every token besides the routed ones (MiniMind2). Several are one FFN of
            `num_shared_experts * moe_intermediate_size` columns, which computes their sum.
        router_aux_loss_type: Formula of the load-balancing loss, see `router_auxiliary_loss` in the modeling file:
            `"switch"` (MiniMind-3), `"sequence"` (MiniMind2) or `"batch"` (MiniMind2 with `seq_aux=False`).
        head_dim: Size of one head; left out, `hidden_size // num_attention_heads`.
        intermediate_size: Width of the dense FFN; left out, MiniMind-3's rule `64 * ceil(pi * hidden_size / 64)`.
        moe_intermediate_size: Width of one expert; left out, `intermediate_size`.
        norm_topk_prob: Weights of the chosen experts sum up to 1. With one expert per token, as released, that weight
            is always 1, and the router learns from the load-balancing loss only, not from which expert answers best:
            to train a router, take `num_experts_per_tok=2` or `norm_topk_prob=False`.

    Raises:
        ValueError: The values contradict each other; the message names them.
    """

    model_type = "minimind"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]
    default_theta = 1_000_000.0
    base_model_ep_plan = None

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
    router_aux_loss_type: str = "switch"
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(math.pi * self.hidden_size / 64)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if not self.use_moe:
            self.router_aux_loss_coef = 0.0  # TRL asks every model that has this field, and not 0, for its router loss
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): every key/value head serves the same number of query heads."
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim must be even for RoPE, which rotates pairs; got {self.head_dim}.")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts ({self.num_experts}); "
                f"got {self.num_experts_per_tok}."
            )
        check_choice(self, "router_aux_loss_type", ("switch", "sequence", "batch"))

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Qwen3-MoE's plan without the modules that this decoder does not have."""
        plan = {}
        for name, style in Qwen3MoeConfig.base_model_tp_plan.items():
            if self.use_moe and self.num_shared_experts:
                name = re.sub(r"mlp\.(gate|up|down)_proj", r"mlp.shared_experts.\1_proj", name)
            has_module = self.use_qk_norm if "_norm" in name else True
            if ".mlp." in name:
                has_module = self.use_moe == ("experts" in name)
            if has_module:
                plan[name] = style
        return plan

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the `auto_map` that lets the saved checkpoint load by itself with trust_remote_code."""
        return {
            **super().to_dict(),
            "auto_map": {
                "AutoConfig": "configuration_minimind_v.MiniMindConfig",
                "AutoModel": "modeling_minimind_v.MiniMindModel",
                "AutoModelForCausalLM": "modeling_minimind_v.MiniMindForCausalLM",
            },
        }


@strict
class MiniMindVConfig(PreTrainedConfig):
    """Configuration of MiniMind-V. Without any argument: MiniMind-3V as released (SigLIP-B/32 at 256 px, 64 tokens).

    Args:
        text_config: `MiniMindConfig` or a dict of its fields.
        vision_config: Configuration of a vision tower, or a dict with its `model_type` (`clip_vision_model` or
            `siglip_vision_model`; left out, the latter).
        image_token_id: Id that marks the places of image features in `input_ids`. Required as soon as one of the two
            configurations is given.
        image_seq_length: Tokens of one image; left out, what the tower produces.
        projector_type: `"mlp"` (MiniMind-3: LayerNorm, Linear, activation, Linear) or `"linear"` (MiniMind2).
        projector_hidden_act: Activation of the mlp projector; `"gelu"` is the exact one.
        vision_feature_select_strategy: `"default"` drops the tower's first token (CLS), `"full"` keeps all; left out,
            `"default"` for CLIP, which has a CLS token, and `"full"` for SigLIP, which has none.
        tie_word_embeddings: Embedding and output matrix are one tensor; left out, as `text_config` says.

    Raises:
        ValueError: An impossible value; the message says what was received and what was expected.

    Example:
        >>> config = MiniMindVConfig(text_config={"hidden_size": 512}, vision_config={}, image_token_id=12)
        >>> config.image_seq_length
        196
    """

    model_type = "minimind_v"
    sub_configs = {"text_config": MiniMindConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss", "image_hidden_states"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    image_seq_length: int | None = None
    projector_type: str = "mlp"
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: str | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None and self.vision_config is None:
            self.vision_config = {"image_size": 256, "patch_size": 32, "vision_use_head": False}
            self.image_token_id = 12 if self.image_token_id is None else self.image_token_id  # <|image_pad|>
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = MiniMindConfig(**(self.text_config or {}))
        if self.vision_config is None or isinstance(self.vision_config, dict):
            vision_config = {"model_type": "siglip_vision_model", **(self.vision_config or {})}
            self.vision_config = CONFIG_MAPPING[vision_config["model_type"]](**vision_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        if self.vision_config.model_type in ("clip", "siglip"):  # never the text half
            self.vision_config = self.vision_config.vision_config
        has_cls_token = self.vision_config.model_type == "clip_vision_model"
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if has_cls_token else "full"
        self._check_values(has_cls_token)
        if not __name__.startswith("transformers_modules."):
            # Read from config.json. As an attribute it would make `pipeline` demand trust_remote_code, although the
            # package is installed and has registered its pipeline; `to_dict` writes it again.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def _check_values(self, has_cls_token: bool) -> None:
        check_choice(self, "projector_type", ("linear", "mlp"))
        check_choice(self, "vision_feature_select_strategy", ("default", "full") if has_cls_token else ("full",))
        if self.image_token_id is None or not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                "image_token_id must be the tokenizer's id of the image placeholder, between 0 and vocab_size - 1 "
                f"({self.text_config.vocab_size - 1}); got {self.image_token_id}."
            )
        grid = self.vision_config.image_size // self.vision_config.patch_size
        produced = grid * grid + has_cls_token - (self.vision_feature_select_strategy == "default")
        if self.image_seq_length is None:
            self.image_seq_length = produced
        if self.image_seq_length != produced:
            raise ValueError(
                f"image_seq_length must be {produced}, the number of tokens that the tower makes of one image "
                f"({self.vision_config.model_type}: {grid} x {grid} patches, vision_feature_select_strategy="
                f"{self.vision_feature_select_strategy!r}); got {self.image_seq_length}."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what lets the saved checkpoint load by itself: `auto_map` and the image-to-text pipeline."""
        output = super().to_dict()
        output.pop("use_cache", None)  # Trainer turns it off while it trains
        for name in self.sub_configs:  # as the library sets it on loading, so that saving again changes nothing
            output[name]["dtype"] = output.get("dtype")
        return {
            **output,
            "auto_map": {
                "AutoConfig": "configuration_minimind_v.MiniMindVConfig",
                "AutoModel": "modeling_minimind_v.MiniMindVModel",
                "AutoModelForCausalLM": "modeling_minimind_v.MiniMindVForConditionalGeneration",
                "AutoModelForImageTextToText": "modeling_minimind_v.MiniMindVForConditionalGeneration",
                "AutoModelForMultimodalLM": "modeling_minimind_v.MiniMindVForConditionalGeneration",
                "AutoProcessor": "processing_minimind_v.MiniMindVProcessor",
            },
            "custom_pipelines": {
                "image-to-text": {
                    "impl": "processing_minimind_v.MiniMindVImageToTextPipeline",
                    "pt": ["AutoModelForImageTextToText"],
                    "type": "multimodal",
                }
            },
        }


# Registration makes save_pretrained copy this file, and those it imports, next to the weights.
MiniMindConfig.register_for_auto_class()
MiniMindVConfig.register_for_auto_class()

__all__ = ["MiniMindConfig", "MiniMindVConfig"]
