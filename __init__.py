"""MiniMind-V: a small vision-language model, native to transformers.

Importing this package registers its classes, so that `AutoModelForImageTextToText.from_pretrained` and
`pipeline("image-to-text", ...)` work on MiniMind-V checkpoints without trust_remote_code.
"""

from pathlib import Path

from . import configuration_minimind_v  # noqa: F401 isort: skip - first: it says when transformers is too old
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipelines,
)

from .common import CheckedModel
from .configuration_minimind_v import MiniMindConfig, MiniMindVConfig
from .modeling_minimind_v import (
    MiniMindForCausalLM,
    MiniMindModel,
    MiniMindVForConditionalGeneration,
    MiniMindVModel,
)
from .processing_minimind_v import MiniMindVImageToTextPipeline, MiniMindVProcessor

__version__ = "0.1.0"
EMBEDDED_MODEL = Path(__file__).resolve().parent / "checkpoints" / "minimind-v-emoji"

AutoConfig.register("minimind", MiniMindConfig)
AutoConfig.register("minimind_v", MiniMindVConfig)
AutoModel.register(MiniMindConfig, MiniMindModel)
AutoModel.register(MiniMindVConfig, MiniMindVModel)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM)
AutoModelForCausalLM.register(MiniMindVConfig, MiniMindVForConditionalGeneration)
AutoModelForImageTextToText.register(MiniMindVConfig, MiniMindVForConditionalGeneration)
AutoModelForMultimodalLM.register(MiniMindVConfig, MiniMindVForConditionalGeneration)
AutoProcessor.register(MiniMindVConfig, MiniMindVProcessor)

pipelines.PIPELINE_REGISTRY.register_pipeline(
    "image-to-text",
    pipeline_class=MiniMindVImageToTextPipeline,
    pt_model=(CheckedModel,),
    type="multimodal",
)

# The library sends the name "image-to-text" to another pipeline before it looks into its registry.
_resolve_deprecated_task = pipelines._resolve_deprecated_task
pipelines._resolve_deprecated_task = lambda task: task if task == "image-to-text" else _resolve_deprecated_task(task)

__all__ = [
    "EMBEDDED_MODEL",
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "MiniMindModel",
    "MiniMindVConfig",
    "MiniMindVForConditionalGeneration",
    "MiniMindVImageToTextPipeline",
    "MiniMindVModel",
    "MiniMindVProcessor",
]
