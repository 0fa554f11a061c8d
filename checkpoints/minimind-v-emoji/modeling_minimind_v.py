"""MiniMind-V: vision tower -> projector -> MiniMind decoder, from the building blocks of transformers.

Read from the top, this file is a whole vision-language model:
- the decoder is the library's Qwen3-MoE; only what MiniMind does differently is written here (optional q/k norm,
  shared experts, the router loss);
- the tower is any CLIP or SigLIP vision model of the library;
- the projector turns the tower's features into embeddings of the decoder;
- fusion is one `masked_scatter`: the projected features take the places of the placeholder tokens;
- `generate()` is the library's. Its two hooks below only keep the flat list of images in step with the rows.

Shapes: B rows, T tokens, N images in the whole batch, S = `image_seq_length` tokens per image, H = `hidden_size`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_minimind_v import MiniMindConfig, MiniMindVConfig
from .processing_minimind_v import MiniMindVProcessor  # noqa: F401 - a saved model takes along the files it imports

# Pipelines log an error for a model class that is not in these tables.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minimind"] = "MiniMindForCausalLM"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minimind_v"] = "MiniMindVForConditionalGeneration"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["minimind_v"] = "MiniMindVForConditionalGeneration"


# --- The decoder -----------------------------------------------------------------------------------------------------


@use_experts_implementation  # must stand in this file: the library looks for it in the source of the model
class MiniMindExperts(qwen3_moe.Qwen3MoeExperts):
    """Weights of all routed experts as two tensors; the library's eager, batched and grouped kernels run them."""


class MiniMindSparseMoeBlock(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """Top-k routed experts, plus the shared experts of MiniMind2, which see every token with weight 1."""

    def __init__(self, config: MiniMindConfig) -> None:
        nn.Module.__init__(self)
        self.experts = MiniMindExperts(config)
        self.gate = qwen3_moe.Qwen3MoeTopKRouter(config)
        width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = qwen3_moe.Qwen3MoeMLP(config, intermediate_size=width) if width else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        routed = super().forward(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class MiniMindDecoderLayer(qwen3_moe.Qwen3MoeDecoderLayer):
    """Pre-norm block: x + attention(norm(x)), then + feed_forward(norm(x))."""

    def __init__(self, config: MiniMindConfig, layer_idx: int) -> None:
        super(qwen3_moe.Qwen3MoeDecoderLayer, self).__init__()  # the modules are built here, not by Qwen3-MoE
        self.hidden_size = config.hidden_size
        self.self_attn = qwen3_moe.Qwen3MoeAttention(config, layer_idx)
        if not config.use_qk_norm:
            # The library's attention stays as it is: vLLM recognises it by its source.
            self.self_attn.q_norm = self.self_attn.k_norm = nn.Identity()
        sparse = config.use_moe and layer_idx not in config.mlp_only_layers
        sparse = sparse and (layer_idx + 1) % config.decoder_sparse_step == 0
        self.mlp = MiniMindSparseMoeBlock(config) if sparse else qwen3_moe.Qwen3MoeMLP(config)
        self.input_layernorm = qwen3_moe.Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = qwen3_moe.Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MiniMindPreTrainedModel(qwen3_moe.Qwen3MoePreTrainedModel):
    config: MiniMindConfig
    _no_split_modules = ["MiniMindDecoderLayer"]


class MiniMindModel(MiniMindPreTrainedModel, qwen3_moe.Qwen3MoeModel):
    """The decoder without a head. Its forward is the one of Qwen3-MoE."""

    def __init__(self, config: MiniMindConfig) -> None:
        super(qwen3_moe.Qwen3MoeModel, self).__init__(config)  # the modules are built here, not by Qwen3-MoE
        # No padding_idx: the padding token <|endoftext|> is also text, and its embedding is trained like any other.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = qwen3_moe.Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = qwen3_moe.Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


def router_auxiliary_loss(
    router_logits: tuple[torch.Tensor, ...], config: MiniMindConfig, batch_size: int
) -> torch.Tensor:
    """Load-balancing loss of a mixture of experts, summed over the layers, before `router_aux_loss_coef`.

    With E experts, top-k routing, f_e the number of times a token chose expert e divided by the number of tokens, and
    P_e the mean routing probability of e, a layer's loss is
    - `"switch"`: E * sum_e f_e P_e over all tokens of the batch (MiniMind-3; Switch Transformer, arXiv:2101.03961,
      equation 4, for k = 1);
    - `"batch"`: the same divided by k (MiniMind2 with `seq_aux=False`);
    - `"sequence"`: as `"batch"`, computed in each row and averaged over the rows (MiniMind2; DeepSeek-V2,
      arXiv:2405.04434, equation 12).
    As in the original, padding and image tokens count.

    Args:
        router_logits: One float tensor `[B * T, E]` per layer.
        config: Configuration of the decoder.
        batch_size: B.

    Returns:
        Scalar float32 tensor.
    """
    groups = batch_size if config.router_aux_loss_type == "sequence" else 1
    loss = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(config.num_experts_per_tok, dim=-1).indices
        choices = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        f = choices.view(groups, -1, config.num_experts).mean(dim=1)
        p = probabilities.view(groups, -1, config.num_experts).mean(dim=1)
        loss = loss + config.num_experts * (f * p).sum(dim=-1).mean().to(loss.device)
    return loss if config.router_aux_loss_type == "switch" else loss / config.num_experts_per_tok


@dataclass
class MiniMindVModelOutputWithPast(MoeModelOutputWithPast):
    """The library's fields and `image_hidden_states`, the projected image features `[N * S, H]` or None."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class MiniMindVCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The library's fields and `image_hidden_states`, the projected image features `[N * S, H]` or None."""

    image_hidden_states: torch.FloatTensor | None = None


class MiniMindHeadMixin:
    """What the text-only and the vision-language model do after their backbone: logits, cross entropy, router loss."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def check_prompt_length(self, length: int) -> None:
        positions = self.config.get_text_config().max_position_embeddings
        if length > positions:
            raise ValueError(
                f"The prompt has {length} tokens, but the model has only {positions} positions "
                "(max_position_embeddings). Shorten the text or pass fewer images."
            )

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
        """Logits `[B, T, vocab_size]` and, with `labels` `[B, T]` (-100: no loss), the loss.

        In training, a mixture of experts adds `router_aux_loss_coef * aux_loss` to the cross entropy;
        `output_router_logits` asks for `router_logits`, `aux_loss` and the sum outside of training too.

        Raises:
            ValueError: The prompt is longer than `max_position_embeddings`.
        """
        config = self.config.get_text_config()
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        if prompt is not None and position_ids is None:  # rows packed into one bring their own positions
            self.check_prompt_length(prompt.shape[1])
        if use_cache is None and self.training and labels is not None:
            use_cache = False  # no use for one; and only without it the library keeps packed rows apart
        if output_router_logits is None:
            output_router_logits = config.output_router_logits or (self.training and labels is not None)
        output_router_logits = output_router_logits and config.use_moe

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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, config.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = router_auxiliary_loss(outputs.router_logits, config, batch_size=prompt.shape[0])
            if loss is not None:
                weight = config.router_aux_loss_coef
                if (num_items := kwargs.get("num_items_in_batch")) is not None:
                    # The losses of the batches of one accumulated step are added up, so each brings its share only.
                    weight = weight * (labels[:, 1:] != -100).sum() / num_items
                loss = loss + weight * aux_loss.to(loss.device)
        return MiniMindVCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.get("image_hidden_states"),  # not a field of the text-only backbone
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate()`, which brings positions of its own: so the prompt is checked here."""
        if is_first_iteration:
            self.check_prompt_length((input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )


class MiniMindForCausalLM(MiniMindHeadMixin, MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its language modeling head: text only."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# --- Vision and language ---------------------------------------------------------------------------------------------


def mismatch_message(tokens: int | torch.Tensor, features: int) -> str:
    return f"Image features and image tokens do not match, tokens: {tokens}, features: {features}"


class MiniMindVMultiModalProjector(nn.Sequential):
    """Tower features `[N, S, tower width]` -> decoder embeddings `[N, S, H]`."""

    def __init__(self, config: MiniMindVConfig) -> None:
        width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        if config.projector_type == "linear":
            modules = {"linear": nn.Linear(width, hidden_size)}
        else:
            modules = {
                "norm": nn.LayerNorm(width, eps=1e-5),
                "linear_1": nn.Linear(width, hidden_size),
                "act": ACT2FN[config.projector_hidden_act],
                "linear_2": nn.Linear(hidden_size, hidden_size),
            }
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
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes images once; the result can be passed as `mm_encoder_outputs={"image": ...}` to many calls.

        Args:
            pixel_values: Float tensor `[N, 3, height, width]` from the processor.

        Returns:
            The tower's output; its `pooler_output` is a list with one projected tensor `[S, H]` per image.
        """
        # A frozen tower needs no graph, even where something (PEFT) made its input require gradients.
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (trains or pixel_values.requires_grad)):
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        # MiniMind2 takes CLIP's features before post_layernorm, MiniMind-3 SigLIP's after it: for both, this field.
        features = outputs.last_hidden_state
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None
    ) -> torch.BoolTensor:
        """`[B, T]`: where the token, or the embedding where there are no ids, is the image placeholder."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def find_whole_images(self, is_placeholder: torch.BoolTensor) -> torch.BoolTensor:
        """Of the placeholders `[B, T]`, those that fill whole images, from the start of each unbroken run.

        MiniMind2's placeholder is the character `@`, which also occurs in text; a few of those are not an image.
        """
        length = self.config.image_seq_length
        positions = torch.arange(is_placeholder.shape[1], device=is_placeholder.device).expand_as(is_placeholder)
        before = torch.where(is_placeholder, -1, positions).cummax(dim=1).values
        after = torch.where(is_placeholder, positions.shape[1], positions).flip(1).cummin(dim=1).values.flip(1)
        return is_placeholder & (positions - before <= (after - before - 1) // length * length)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: torch.FloatTensor,
    ) -> torch.BoolTensor:
        """Places `[B, T, 1]` that the image features `[N * S, H]` take.

        All placeholders where their number fits (so that a part of a prompt may end inside an image), else those that
        fill whole images.

        Raises:
            ValueError: The places are not as many as the features.
        """
        is_placeholder = self.find_placeholders(input_ids, inputs_embeds)
        fits = is_placeholder.sum() == image_features.shape[0]
        mask = torch.where(fits, is_placeholder, self.find_whole_images(is_placeholder))
        torch_compilable_check(
            mask.sum() == image_features.shape[0],
            lambda: mismatch_message(is_placeholder.sum(), image_features.shape[0]),
        )
        return mask.unsqueeze(-1)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MiniMindVModelOutputWithPast:
        """Hidden states `[B, T, H]` of text in which the placeholder tokens stand for images.

        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, H]`.
            pixel_values: `[N, 3, height, width]`: all images of the batch, in reading order.
            mm_encoder_outputs: Instead of `pixel_values`, `{"image": get_image_features(...)}`.

        Raises:
            ValueError: Not exactly one of each pair is given, or images and placeholder tokens do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("Pass the images as pixel_values or as mm_encoder_outputs, not as both.")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # All processes must run the same modules (DDP waits for every gradient, FSDP for every gather), so a batch
            # of text encodes an empty image and adds nothing of it.
            vision = self.config.vision_config
            size = (1, vision.num_channels, vision.image_size, vision.image_size)
            features = self.get_image_features(inputs_embeds.new_zeros(size), return_dict=True).pooler_output
            inputs_embeds = inputs_embeds + 0 * features[0].sum()

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return MiniMindVModelOutputWithPast(**outputs, image_hidden_states=image_features)


class MiniMindVForConditionalGeneration(MiniMindHeadMixin, MiniMindVPreTrainedModel, GenerationMixin):
    """MiniMind-V: text and images in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

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

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MiniMindVCausalLMOutputWithPast:
        """As [`MiniMindHeadMixin.forward`], with the images of [`MiniMindVModel.forward`].

        Example:
            >>> chat = [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}]}]
            >>> options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            >>> inputs = processor.apply_chat_template(chat, return_tensors="pt", **options)
            >>> logits = model(**inputs).logits
        """
        images = {"pixel_values": pixel_values, "mm_encoder_outputs": mm_encoder_outputs}
        text = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels)
        return super().forward(*text, logits_to_keep=logits_to_keep, **images, **kwargs)

    # Images are flat over the batch, so where generate() repeats rows or cuts what the cache holds, the images have to
    # follow. The library repeats them since 5.19 (changing the caller's features in place) and never cuts them.

    def _follow_rows(
        self,
        images: dict[str, Any],
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None,
        cut: int = 0,
        repeat: int = 1,
    ) -> None:
        """Picks from `images` those of the rows without their first `cut` tokens, each row `repeat` times."""
        # generate() makes empty ids where it was given embeddings
        is_placeholder = self.model.find_placeholders(input_ids if inputs_embeds is None else None, inputs_embeds)
        is_placeholder = self.model.find_whole_images(is_placeholder)
        counts = torch.stack([is_placeholder.sum(dim=1), is_placeholder[:, cut:].sum(dim=1)], dim=1)
        indices, end = [], 0
        for count, left in (counts // self.config.image_seq_length).tolist():
            end += count
            indices += [*range(end - left, end)] * repeat
        pixel_values, features = images.get("pixel_values"), (images.get("mm_encoder_outputs") or {}).get("image")
        for given in (pixel_values, features and features.pooler_output):
            if given is not None and len(given) != end:
                length = self.config.image_seq_length
                raise ValueError(mismatch_message(end * length, len(given) * length))
        if pixel_values is not None:
            images["pixel_values"] = pixel_values[indices] if indices else None
        if features is not None:
            features = BaseModelOutputWithPooling(pooler_output=[features.pooler_output[i] for i in indices])
            images["mm_encoder_outputs"] = {"image": features} if indices else {}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeats every row `expand_size` times (beams, `num_return_sequences`), each with all of its images."""
        images = {key: model_kwargs.pop(key) for key in ("pixel_values", "mm_encoder_outputs") if key in model_kwargs}
        if expand_size > 1 and images:
            self._follow_rows(images, input_ids, model_kwargs.get("inputs_embeds"), repeat=expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step; images go with the tokens that are already in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        if is_first_iteration:
            key, prompt = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
            if cut := prompt.shape[1] - inputs[key].shape[1]:
                self._follow_rows(inputs, input_ids, inputs_embeds, cut=cut)
        elif kwargs.get("use_cache", True):
            inputs.pop("mm_encoder_outputs", None)  # as the library does since 5.19
        return inputs


# Registration makes save_pretrained copy this file, and those it imports, next to the weights.
MiniMindModel.register_for_auto_class("AutoModel")
MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MiniMindVModel.register_for_auto_class("AutoModel")
MiniMindVForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MiniMindForCausalLM", "MiniMindModel", "MiniMindVForConditionalGeneration", "MiniMindVModel"]
