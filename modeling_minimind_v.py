"""MiniMind-V: vision tower -> projector -> MiniMind decoder, from the building blocks of transformers.

Read from the top, this file is a whole vision-language model:
- the decoder is the library's Qwen3-MoE with what MiniMind does differently: optional q/k norm, shared experts, the
  router loss;
- the tower is any CLIP or SigLIP vision model of the library;
- the projector turns the tower's features into embeddings of the decoder;
- fusion is one `masked_scatter`: the projected features take the places of the placeholder tokens;
- `generate()` is the library's.

Shapes: B rows, T tokens, N images in the whole batch, S = `image_seq_length` tokens per image, H = `hidden_size`.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_minimind_v import MiniMindConfig, MiniMindVConfig
from .generation_minimind_v import MiniMindVGenerationMixin
from .processing_minimind_v import MiniMindVProcessor  # noqa: F401 - a saved model takes along the files it imports
from .router_loss_minimind_v import number_rows, router_auxiliary_loss
from .vision_tower_minimind_v import NAFLEX, image_shape

# --- The decoder -----------------------------------------------------------------------------------------------------


@use_experts_implementation  # must stand in this file: the library looks for it in the source of the model
class MiniMindExperts(qwen3_moe.Qwen3MoeExperts):
    """Weights of all routed experts as two tensors; the library's eager, batched and grouped kernels run them."""


class MiniMindSparseMoeBlock(nn.Module):
    """Top-k routed experts, plus the shared experts of MiniMind2, which see every token with weight 1."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__()
        self.gate = qwen3_moe.Qwen3MoeTopKRouter(config)
        self.experts = MiniMindExperts(config)
        width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = qwen3_moe.Qwen3MoeMLP(config, intermediate_size=width) if width else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)  # (B, T, H) -> (B * T, H)
        _, weights, chosen = self.gate(tokens)
        output = self.experts(tokens, chosen, weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output


class MiniMindPreTrainedModel(qwen3_moe.Qwen3MoePreTrainedModel):
    config: MiniMindConfig


class MiniMindModel(MiniMindPreTrainedModel, qwen3_moe.Qwen3MoeModel):
    """The decoder without a head: Qwen3-MoE, with its modules exchanged where MiniMind has others."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        # No padding_idx: the padding token <|endoftext|> is also text, and its embedding is trained like any other.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        for layer in self.layers:
            if not config.use_qk_norm:
                # The library's attention stays as it is: vLLM recognises it by its source.
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
            if isinstance(layer.mlp, qwen3_moe.Qwen3MoeSparseMoeBlock):
                layer.mlp = MiniMindSparseMoeBlock(config)
        self.post_init()


@dataclass
class MiniMindVModelOutputWithPast(MoeModelOutputWithPast):
    """The library's fields and `image_hidden_states`, the projected image features `[N * S, H]` or None."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class MiniMindVCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The library's fields and `image_hidden_states`, the projected image features `[N * S, H]` or None."""

    image_hidden_states: torch.FloatTensor | None = None


def predict_next_tokens(
    model: "MiniMindForCausalLM | MiniMindVForConditionalGeneration",
    outputs: MoeModelOutputWithPast,
    labels: torch.LongTensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    **kwargs: Any,
) -> MiniMindVCausalLMOutputWithPast:
    """Logits, loss and router loss: what both models with a head make of the hidden states in `outputs`."""
    config, hidden_states = model.config.get_text_config(), outputs.last_hidden_state
    if isinstance(logits_to_keep, int):
        kept = hidden_states[:, slice(-logits_to_keep, None)]
    else:  # positions, the same in all rows [K] or each row's own [B, K]
        kept = hidden_states[torch.arange(len(hidden_states), device=hidden_states.device)[:, None], logits_to_keep]
    logits = model.lm_head(kept)
    loss = aux_loss = None
    if labels is not None:
        loss = model.loss_function(logits, labels, config.vocab_size, **kwargs)
    if outputs.router_logits:
        rows = number_rows(hidden_states.shape[:2], attention_mask, position_ids)
        aux_loss = router_auxiliary_loss(outputs.router_logits, config, rows.to(hidden_states.device))
        if loss is not None:
            weight = config.router_aux_loss_coef
            if (num_items := kwargs.get("num_items_in_batch")) is not None:
                # The losses of the batches of one accumulated step are added up, so each brings its share only.
                weight = weight * (labels[:, 1:] != -100).sum() / num_items
            loss = loss + weight * aux_loss.to(loss.device)
    rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    return MiniMindVCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **rest)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its language modeling head: text only."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MiniMindVCausalLMOutputWithPast:
        """Logits `[B, T, vocab_size]`, with `labels` `[B, T]` (-100: none) the loss; in training, and where
        `output_router_logits` asks for it, that contains the router loss of a mixture of experts.
        """
        if use_cache is None and position_ids is not None and past_key_values is None:
            use_cache = False  # rows packed into one bring positions, and see each other as soon as there is a cache
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits or (self.training and labels is not None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        return predict_next_tokens(self, outputs, labels, logits_to_keep, attention_mask, position_ids, **kwargs)


# --- Vision and language ---------------------------------------------------------------------------------------------


class MiniMindVPatchMerger(nn.Module):
    """Several patches become one token, one after the other: `[N, P, W]` -> `[N, P / size, size * W]`."""

    def __init__(self, config: MiniMindVConfig) -> None:
        super().__init__()
        self.size, self.order = config.projector_merge_size, config.projector_merge_order

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        images, patches, width = features.shape
        if self.order == "block":  # a square of patches, top left first; in sequence, it is a part of a row
            grid, block = math.isqrt(patches), math.isqrt(self.size)
            features = features.view(images, grid // block, block, grid // block, block, width).transpose(2, 3)
        return features.reshape(images, patches // self.size, self.size * width)


class MiniMindVMultiModalProjector(nn.Sequential):
    """Tower features `[N, P, tower width]` -> decoder embeddings `[N, S, H]`."""

    def __init__(self, config: MiniMindVConfig) -> None:
        width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        modules: dict[str, nn.Module] = {}
        if config.projector_merge_size > 1:
            modules["merge"] = MiniMindVPatchMerger(config)
            width *= config.projector_merge_size
        if config.projector_type == "linear":
            modules["linear"] = nn.Linear(width, hidden_size)
        else:
            if config.projector_norm:
                modules["norm"] = nn.LayerNorm(width, eps=1e-5)
            modules |= {"linear_1": nn.Linear(width, hidden_size), "act": ACT2FN[config.projector_hidden_act]}
            modules["linear_2"] = nn.Linear(hidden_size, hidden_size)
        super().__init__(OrderedDict(modules))


class MiniMindVPreTrainedModel(PreTrainedModel):
    config: MiniMindVConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class MiniMindVModel(MiniMindVPreTrainedModel):
    """Vision tower, projector and decoder, without a language modeling head."""

    def __init__(self, config: MiniMindVConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MiniMindVMultiModalProjector(config)
        self.language_model = MiniMindModel(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes images, given as in [`forward`], once, for `mm_encoder_outputs={"image": ...}` of many calls.

        Returns the tower's output; its `pooler_output` is a list with one projected tensor `[S, H]` per image.
        """
        if pixel_values.shape[1:] != (expected := image_shape(self.config.vision_config)):
            shape = ", ".join(map(str, expected))
            raise ValueError(f"pixel_values must be [N, {shape}]; got {list(pixel_values.shape)}.")
        if self.config.vision_config.model_type == NAFLEX:
            if pixel_attention_mask is None or spatial_shapes is None:
                raise ValueError(
                    "The tower also needs pixel_attention_mask and spatial_shapes, which the processor returns."
                )
            kwargs |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        return self.project(self.vision_tower(pixel_values, return_dict=True, **kwargs))

    def project(self, outputs: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Sets `pooler_output`, see [`get_image_features`], from the tower's `last_hidden_state`."""
        # MiniMind2 takes CLIP's features before post_layernorm, MiniMind-3 SigLIP's after it: for both, this field.
        features = outputs.last_hidden_state
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # without CLS
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: torch.FloatTensor,
    ) -> torch.BoolTensor:
        """Where the image token or its embedding stands, `[B, T]`: as often as there are features, or a ValueError."""
        if input_ids is None or input_ids.numel() == 0:  # generate() makes empty ids where it was given embeddings
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        tokens, features = mask.sum(), image_features.shape[0]
        message = "Image features and image tokens do not match, tokens: {}, features: {}"
        torch_compilable_check(tokens == features, lambda: message.format(tokens, features))
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MiniMindVModelOutputWithPast:
        """Hidden states `[B, T, H]` of text in which the image tokens stand for images.

        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, H]`.
            pixel_values: `[N, 3, height, width]`: all images of the batch, in reading order. Of a NaFlex tower, their
                patches `[N, P, pixels of a patch]`, with `pixel_attention_mask` `[N, P]`, where 0 is padding, and
                `spatial_shapes` `[N, 2]`, the rows and columns of patches.
            mm_encoder_outputs: Instead of `pixel_values`, `{"image": get_image_features(...)}`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("Pass the images as pixel_values or as mm_encoder_outputs, not as both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values, pixel_attention_mask, spatial_shapes, return_dict=True
            )

        image_features = None
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_features)
        elif is_distributed and (past_key_values is None or not past_key_values.get_seq_length()):
            # Other processes may run the tower now: DDP waits for all gradients, FSDP and ZeRO for all weights. So a
            # batch of text encodes a blank image too, and adds nothing of it.
            blank = inputs_embeds.new_zeros(1, *image_shape(self.config.vision_config))
            mask, one_row = blank.new_ones(blank.shape[:2]), torch.tensor([[1, blank.shape[1]]])  # of NaFlex's patches
            features = self.get_image_features(blank, mask, one_row, return_dict=True).pooler_output[0]
            inputs_embeds = inputs_embeds + 0 * features.sum().to(inputs_embeds.device)

        if use_cache is None and position_ids is not None and past_key_values is None:
            use_cache = False  # rows packed into one bring positions, and see each other as soon as there is a cache
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return MiniMindVModelOutputWithPast(**outputs, image_hidden_states=image_features)


class MiniMindVForConditionalGeneration(MiniMindVPreTrainedModel, MiniMindVGenerationMixin, GenerationMixin):
    """MiniMind-V: text and images in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MiniMindVConfig) -> None:
        super().__init__(config)
        self.model = MiniMindVModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`MiniMindVModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MiniMindVCausalLMOutputWithPast:
        """As [`MiniMindForCausalLM.forward`], with the images of [`MiniMindVModel.forward`]."""
        if output_router_logits is None:
            default = self.config.text_config.output_router_logits
            output_router_logits = default or (self.training and labels is not None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        return predict_next_tokens(self, outputs, labels, logits_to_keep, attention_mask, position_ids, **kwargs)


# Registration makes save_pretrained copy this file, and those it imports, next to the weights.
MiniMindModel.register_for_auto_class("AutoModel")
MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MiniMindVModel.register_for_auto_class("AutoModel")
MiniMindVForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MiniMindForCausalLM", "MiniMindModel", "MiniMindVForConditionalGeneration", "MiniMindVModel"]
