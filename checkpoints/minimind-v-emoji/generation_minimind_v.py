"""Images in `generate()`: what the library's mixin lacks where features go along with beams and chats that go on."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


class MiniMindVGenerationMixin:
    """Stands before the library's GenerationMixin: images follow rows, beams and chats that go on."""

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Continuous batching by the library, of prompts without images.

        Raises:
            ValueError: There are images, which continuous batching would drop without a word.
        """
        has_image = any(self.config.image_token_id in prompt for prompt in inputs)
        if has_image or kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None:
            raise ValueError("generate_batch takes text only and would drop the images. Pass them to generate().")
        return super().generate_batch(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: torch.LongTensor | None = None, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeats rows and their images for beams; the library does so in place and drops images without a place."""
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if expand_size > 1 and images is not None:
            self.model.get_placeholder_mask(
                input_ids, kwargs.get("inputs_embeds"), torch.cat(list(images.pooler_output))
            )
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=images.pooler_output)}
        return super()._expand_inputs_for_generation(expand_size=expand_size, input_ids=input_ids, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step. In a chat that goes on, the features of images that the cache holds are left out."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        images = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if is_first_iteration and next_sequence_length is not None and images is not None:
            features = torch.cat(list(images.pooler_output))
            mask = self.model.get_placeholder_mask(input_ids, inputs_embeds, features)
            is_new = mask.nonzero()[:, 1] >= mask.shape[1] - next_sequence_length  # one per feature, in reading order
            images = BaseModelOutputWithPooling(pooler_output=[features[is_new.to(features.device)]])
            inputs["mm_encoder_outputs"] = {"image": images}
        return inputs
