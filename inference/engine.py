"""A checkpoint that answers: what `caption`, `chat`, `compare` and a demo share."""

import sys
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.ao.nn.quantized import dynamic
from torch.ao.quantization.qconfig import per_channel_dynamic_qconfig
from transformers import (
    BatchFeature,
    CompileConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)

from .. import EMBEDDED_MODEL
from ..common import count_parameters, load_model, load_processor, read_model_type
from ..conversion import convert_once
from ..modeling_minimind_v import MiniMindVForConditionalGeneration
from ..pipeline_minimind_v import FiniteLogits

DEFAULT_MAX_NEW_TOKENS = 512  # the original's


def note(text: str) -> None:
    """What is not the result itself goes to stderr, dimmed in a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr)


def report_speed(tokens: int, seconds: float) -> None:
    note(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s")


def start_process(device: str) -> PartialState:
    """This process, one of several under `accelerate launch`, and its device.

    Args:
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.

    Raises:
        ValueError: This machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device, True):
        raise ValueError(f"PyTorch finds no {device} device on this machine. Leave out --device, or take cpu.")
    on_cpu = device == "cpu" or not (available["cuda"] or available["mps"])
    # Processes wait for each other at the end only, however long one takes.
    return PartialState(cpu=on_cpu, timeout=timedelta(days=30))


def store_column_major(model: MiniMindVForConditionalGeneration) -> None:
    """Stores the weights of the decoder's linear layers column-major to answer with; values and shapes stay.

    A CPU then decodes one row of float32 about 1.3 times as fast, because PyTorch's matrix product (MKL) reads such
    weights faster for a single row; many rows take about as long (benchmarks/README.md). The output matrix becomes a
    copy of the embeddings, to which it may have been tied, so all parameters are frozen: train before, not after.
    """
    model.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    for module in [*model.model.language_model.modules(), model.lm_head]:
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def quantize_decoder(model: MiniMindVForConditionalGeneration) -> None:
    """Computes the linear layers of the decoder in 8 bits on a CPU: 1.6 to 2 times as fast, nearly the same answers.

    Weights get one scale per output; inputs are rounded as they come. Embeddings, tower, projector and experts (which
    are no linear layers) stay as they are. The model can only answer then, not be saved or trained.
    """
    # PyTorch's only 8-bit product that is fast on CPUs without VNNI; nobody can do anything about what it warns of
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
    for parent in [*model.model.language_model.modules(), model]:
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                layer.qconfig = per_channel_dynamic_qconfig  # pyright: ignore[reportArgumentType]
                setattr(parent, name, dynamic.Linear.from_float(layer))
                del layer.qconfig


def load_answering_model(
    source: str | Path, device: torch.device, dtype: str = "auto"
) -> MiniMindVForConditionalGeneration:
    """A vision-language checkpoint of this package.

    Args:
        source: Checkpoint folder or Hub repository.
        device: Where to compute.
        dtype: Name of a torch dtype; `"auto"` is float32 on a CPU and elsewhere the checkpoint's.

    Raises:
        ValueError: It is another kind of model.
        WeightsError, OSError: As [`load_model`] raises them.
    """
    kind = read_model_type(source)
    if kind != "minimind_v":
        raise ValueError(f"{source} is a {kind} model, not a vision-language one of this package (minimind_v).")
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    model: Any = load_model(source, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval()


def describe(model: PreTrainedModel) -> str:
    """Numbers of parameters, device and dtype of a model, in a line."""
    parts = count_parameters(model)
    total = sum(count for part, count in parts.items() if part != "active")
    details = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in parts.items())
    return f"{total / 1e6:.2f}M parameters ({details}), {model.device}, {str(model.dtype).removeprefix('torch.')}"


class Engine:
    """Model, processor and generation settings.

    Args:
        model: Checkpoint folder or Hub repository, or one of the original project ([`convert_once`]); left out, the
            embedded one.
        greedy: Always the likeliest token, instead of drawn ones.
        temperature, top_p, top_k: For drawn ones, as for `generate`; the defaults are the original's.
        repetition_penalty: As for `generate`; left out, the checkpoint's.
        max_new_tokens: Longest answer; left out, the checkpoint's, or else the original's 512.
        seed: For sampling.
        thinking: Value for the chat template's switch; left out, the template's default.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        dtype: As for [`load_answering_model`], or on a CPU `"int8"` ([`quantize_decoder`]).
        compile: Static cache and compiled steps.
        max_image_pixels: Larger images are refused; left out, the processor's limit.
        allowed_hosts: The only hosts from which images are fetched; empty: none; left out, any public one.

    Attributes:
        model, processor, device: What answers.
        description: Its parameters, device and dtype, in a line.
        thinking_switches: Names that the chat template has for thinking; empty: it has none.
        template_options: What the chat template is told besides the chat.
        tokens, seconds: Of all answers so far.

    Raises:
        ValueError: Not a vision-language checkpoint of this package, no such device, or no switch for thinking.
        WeightsError: Its weights are not whole.
        OSError: There is no such checkpoint.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        greedy: bool = False,
        temperature: float = 0.65,
        top_p: float = 0.85,
        top_k: int = 50,
        repetition_penalty: float | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        thinking: bool | None = None,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool = False,
        max_image_pixels: int | None = None,
        allowed_hosts: Sequence[str] | None = None,
    ) -> None:
        given, state = model or EMBEDDED_MODEL, start_process(device)
        source = convert_once(given, tell=note)
        assert state.device is not None  # as it is only before it is set up
        self.device = state.device
        is_int8, on_cpu = dtype == "int8", self.device.type == "cpu"
        if is_int8 and not on_cpu:
            raise ValueError("int8 is for a CPU. Choose another --dtype, or --device cpu.")
        self.model = load_answering_model(source, self.device, "float32" if is_int8 else dtype)
        self.description = describe(self.model) + (", decoder int8" if is_int8 else "")
        if is_int8:
            quantize_decoder(self.model)
        elif on_cpu and self.model.dtype == torch.float32:
            store_column_major(self.model)
        self.processor = load_processor(source, max_image_pixels, allowed_hosts)
        self.tokens, self.seconds = 0, 0.0

        self.set_decoding(greedy, temperature, top_p, top_k, repetition_penalty, max_new_tokens)
        if seed is not None:
            set_seed(seed)
        if compile:
            config = self.model.generation_config
            config.cache_implementation = "static"  # with it, generate() compiles its steps by itself,
            config.compile_config = CompileConfig()
            # which the library does not do on a CPU unless told (by an attribute that it annotates as None).
            config.compile_config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]

        # MiniMind-3 has one name for it, MiniMind2 the other.
        names = ("open_thinking", "enable_thinking")
        self.thinking_switches = [name for name in names if name in (self.processor.chat_template or "")]
        if thinking is not None and not self.thinking_switches:
            raise ValueError(f"{source} has no switch for thinking in its chat template. Leave out --(no-)thinking.")
        self.template_options = {} if thinking is None else dict.fromkeys(self.thinking_switches, thinking)
        if state.is_main_process:
            note(f"{Path(given).resolve().name}: {self.description}")

    def set_decoding(
        self,
        greedy: bool,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float | None,
        max_new_tokens: int | None,
    ) -> None:
        """How answers are decoded from now on; see the class."""
        config = self.model.generation_config
        config.do_sample = not greedy
        config.temperature, config.top_p, config.top_k = (None, None, None) if greedy else (temperature, top_p, top_k)
        config.repetition_penalty = repetition_penalty or config.repetition_penalty
        config.max_new_tokens = max_new_tokens or config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    def generate(self, inputs: BatchFeature, **options: Any) -> torch.Tensor:
        """The tokens of the answers to a left-padded batch of chats, as [`encode`] makes it.

        Args:
            inputs: Model inputs, `input_ids` of shape `[rows, length]`.
            options: For the model's `generate`.

        Returns:
            Token ids `[rows, longest answer]` on the CPU, padded on the right.

        Raises:
            ValueError: The logits are not finite.
        """
        length = inputs["input_ids"].shape[1]
        positions = self.model.config.get_text_config().max_position_embeddings
        longest = max(1, min(self.model.generation_config.max_new_tokens, positions - length))
        start = time.perf_counter()
        # The library's protocol for `self` asks for attributes that few of its own models have
        sequences = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **inputs.to(self.device),
            max_new_tokens=longest,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            **options,
        )
        answers = sequences[:, length:].cpu()
        self.seconds += time.perf_counter() - start
        self.tokens += int((answers != self.processor.tokenizer.pad_token_id).sum())
        return answers

    def answer(self, inputs: BatchFeature) -> list[str]:
        """One answer per row of a batch, given as to [`generate`]."""
        answers = self.processor.batch_decode(self.generate(inputs), skip_special_tokens=True)
        return [text.strip() for text in answers]

    def stream(self, inputs: BatchFeature) -> Generator[str, None, None]:
        """The answer to one chat, in pieces as they come. The model stops where the iterator is closed.

        Args:
            inputs: As for [`generate`], of one row.

        Raises:
            ValueError: The logits are not finite.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_closed = threading.Event()
        criteria: Any = [lambda ids, scores, **_: torch.full(ids.shape[:1], is_closed.is_set(), device=ids.device)]
        with ThreadPoolExecutor(1) as executor:
            answer = executor.submit(
                self.generate, inputs, streamer=streamer, stopping_criteria=StoppingCriteriaList(criteria)
            )
            answer.add_done_callback(lambda _: streamer.end())  # after an error as well
            try:
                yield from streamer
            finally:
                is_closed.set()
            answer.result()  # raises its error


def encode(processor: Any, chats: list[list[dict]], template_options: dict[str, Any] | None = None) -> BatchFeature:
    """Chats to a left-padded batch of model inputs.

    Args:
        processor: The checkpoint's.
        chats: Each a list of messages.
        template_options: What the chat template is told besides, such as [`Engine`]'s.

    Raises:
        ValueError: A chat holds control tokens as text, or an image that cannot be read.
    """
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **template_options or {},
    )


def question(images: list[Any], text: str) -> dict[str, Any]:
    """A user's message: images, then text."""
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}
