"""Checkpoints of this package -> ONNX graphs, for ONNX Runtime and, in the same layout, for transformers.js.

Three graphs: `embed_tokens`, `vision_encoder` (tower and projector) and `decoder_model_merged` (embeddings and cache
in, logits and cache out). A text-only checkpoint is one graph, `model`, which takes ids. The files around them are
those of a LLaVA model, or of the library's decoder, because that is what transformers.js knows how to run; it adds
nothing to the numbers, which are all in the graphs.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..common import atomic_output, load_model, load_processor, read_model_type
from ..processing_minimind_v import MiniMindVProcessor
from ..vision_tower_minimind_v import NAFLEX, image_shape
from .summary import Summary
from .text import library_config
from .verification import MAX_NEW_TOKENS, Question, compare_answers

OPSET = 20
# precision -> ending of file names and `dtype` of transformers.js
PRECISIONS = {"float32": ("", "fp32"), "int8": ("_quantized", "q8"), "int4": ("_q4", "q4")}
BLOCK_SIZE = 32  # weights of 4 bits that share a scale


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "float32",
    overwrite: bool = False,
    check: bool = True,
) -> Summary:
    """Writes ONNX graphs, and a program `chat.py` that asks them with ONNX Runtime alone.

    Args:
        checkpoint: Folder of this package, with or without a tower.
        output: Folder to write.
        precision: `"float32"`; `"int8"`: matrices of 8 bits, activations too (`quantize_dynamic`); `"int4"`: matrices
            of 4 bits in blocks of 32 (`MatMulNBits`), embeddings of 8.
        overwrite: Replace an existing folder.
        check: Ask both three questions, and refuse to write what answers differently in float32.

    Returns:
        What was written and checked.

    Raises:
        AnswersDifferError: The output does not answer as the checkpoint.
        FileExistsError: The output exists and is not empty.
        ImportError: The libraries are not installed.
        ValueError: Not a checkpoint of this package, or its tower is NaFlex.
    """
    return write_graphs(checkpoint, Path(output), precision, overwrite, check, "ONNX Runtime")


def export_web(
    checkpoint: str | Path, output: str | Path, *, precision: str = "int8", overwrite: bool = False, check: bool = True
) -> Summary:
    """Writes what transformers.js runs unmodified, in a browser or in Node. Arguments and errors: [`export_onnx`]."""
    return write_graphs(checkpoint, Path(output), precision, overwrite, check, "transformers.js")


def write_graphs(
    checkpoint: str | Path, output: Path, precision: str, overwrite: bool, check: bool, runtime: str
) -> Summary:
    """See [`export_onnx`]."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'minimind-v[export]'") from error
    if (kind := read_model_type(checkpoint)) not in ("minimind", "minimind_v"):
        raise ValueError(f"{checkpoint} is not a checkpoint of this package: its model_type is {kind!r}.")
    model = load_model(
        checkpoint,
        AutoModelForCausalLM,
        dtype=torch.float32,
        trust_remote_code=False,
        experts_implementation="one_by_one",
    ).eval()
    has_tower = kind == "minimind_v"
    if has_tower and model.config.vision_config.model_type == NAFLEX:
        raise ValueError(
            f"vision_config.model_type {NAFLEX!r} (NaFlex) cannot be an ONNX graph: its tower resizes position "
            "embeddings to the shape of each image. Use this package, or export the decoder: minimind-v export text."
        )
    has_tokenizer = Path(checkpoint, "tokenizer.json").exists()
    suffix, dtype = PRECISIONS[precision]
    with (
        atomic_output(output, overwrite) as folder,
        tqdm(desc="tracing", unit="graph", disable=None, leave=False) as bar,
    ):
        (folder / "onnx").mkdir(parents=True)
        for name, graph in build_graphs(model):
            write_graph(graph, folder / "onnx" / f"{name}{suffix}.onnx", precision)
            bar.update()
        write_json(folder / "config.json", runtime_config(model, dtype))
        model.generation_config.save_pretrained(folder)
        if has_tower:
            write_processor(load_processor(checkpoint), model.config, folder)
        if has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
            for name in ("auto_map", "image_placeholder"):  # of this package's processor
                tokenizer.init_kwargs.pop(name, None)
            tokenizer.save_pretrained(folder, save_jinja_files=False)  # transformers.js reads no others
        checked = "no, as asked for"
        if not has_tokenizer:
            checked = "no: the checkpoint has no tokenizer to ask with"
        elif check:
            bar.set_description("checking")
            checked = f"{check_graphs(checkpoint, folder, precision)} (ONNX Runtime {onnxruntime.__version__})"
        if runtime == "ONNX Runtime" and has_tokenizer:
            shutil.copyfile(Path(__file__).with_name("onnxruntime_chat.py"), folder / "chat.py")
        if runtime == "transformers.js" and check and has_tokenizer:
            checked += "; transformers.js itself was not run"
    notes = []
    if runtime == "transformers.js" and has_tower:
        notes = ["its processor expands the first image token of a prompt only: expand them yourself for more images"]
    return Summary(output, f"ONNX graphs for {runtime}, opset {OPSET}", precision, checked, notes)


# --- Graphs ----------------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """Tower and projector: `pixel_values` `[N, 3, height, width]` -> embeddings of the image tokens `[N, S, H]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # As `get_image_features`, which makes a list with one tensor per image: a graph has no lists
        features = self.model.vision_tower(pixel_values).last_hidden_state
        if self.model.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return self.model.multi_modal_projector(features)


class Decoder(nn.Module):
    """One step: new tokens and the cache of the earlier ones -> logits `[B, T, vocabulary]` and the longer cache.

    Positions are counted in the cache. Padding on the left shifts them, which RoPE does not notice.
    """

    def __init__(self, model: PreTrainedModel, argument: str) -> None:
        super().__init__()
        self.decoder, self.argument = model.get_decoder(), argument
        self.head: Any = model.get_output_embeddings()

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor, past: list) -> tuple[torch.Tensor, list]:
        cache = DynamicCache(past)
        outputs = self.decoder(
            **{self.argument: inputs}, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        )
        layers: list[Any] = cache.layers
        return self.head(outputs.last_hidden_state), [(layer.keys, layer.values) for layer in layers]


def run_experts_one_by_one(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Each expert on the tokens that chose it, as the library's eager loop; but over all experts, chosen or not.

    So the loop can be traced, and each matrix is a constant of its own, which can be quantized. Arguments and output
    are those of every function of the library's `ExpertsInterface`.
    """
    output = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        token, choice = torch.where(top_k_index == expert)
        # As a batch of one: quantizers look for MatMul, and two dimensions would become Gemm
        hidden = experts._apply_gate(linear(hidden_states[None, token], experts.gate_up_proj[expert]))
        hidden = linear(hidden, experts.down_proj[expert])[0]
        output = output.index_add(0, token, hidden * top_k_weights[token, choice, None])
    return output


ALL_EXPERTS_FUNCTIONS.register("one_by_one", run_experts_one_by_one)


def build_graphs(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the graphs, and what `torch.onnx.export` needs for each; the sizes of the examples mean nothing."""
    text = model.config.get_text_config()
    batch, length, past_length = 2, 3, 4
    has_tower = hasattr(model.model, "vision_tower")
    ids, token_axes = torch.zeros(batch, length, dtype=torch.long), {0: "batch_size", 1: "sequence_length"}
    if has_tower:
        yield (
            "embed_tokens",
            {
                "model": model.get_input_embeddings(),
                "args": (ids,),
                "input_names": ["input_ids"],
                "output_names": ["inputs_embeds"],
                "dynamic_shapes": (token_axes,),
            },
        )
        yield (
            "vision_encoder",
            {
                "model": VisionEncoder(model),
                "args": (torch.zeros(batch, *image_shape(model.config.vision_config)),),
                "input_names": ["pixel_values"],
                "output_names": ["image_features"],
                "dynamic_shapes": ({0: "batch_size"},),
            },
        )
    shape = batch, text.num_key_value_heads, past_length, text.head_dim
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(text.num_hidden_layers)]  # no tensor twice
    cache_axes = {0: "batch_size", 2: "past_sequence_length"}
    caches = [f"{i}.{part}" for i in range(text.num_hidden_layers) for part in ("key", "value")]
    argument = "inputs_embeds" if has_tower else "input_ids"
    mask = torch.ones(batch, past_length + length, dtype=torch.long)
    yield (
        "decoder_model_merged" if has_tower else "model",
        {
            "model": Decoder(model, argument),
            "args": (
                torch.zeros(batch, length, text.hidden_size) if has_tower else ids,
                mask,
                past,
            ),
            "input_names": [argument, "attention_mask", *(f"past_key_values.{name}" for name in caches)],
            "output_names": ["logits", *(f"present.{name}" for name in caches)],
            "dynamic_shapes": (
                token_axes,
                {0: "batch_size", 1: "total_sequence_length"},
                [(cache_axes, cache_axes)] * text.num_hidden_layers,
            ),
        },
    )


def write_graph(graph: dict[str, Any], path: Path, precision: str) -> None:
    """Traces a graph, folds what is constant, so that every matrix stands as it is multiplied, and quantizes it."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize

    with quiet_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(**graph, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        unlimited = 2**63
        model = optimize(program.model, input_size_limit=unlimited, output_size_limit=unlimited)
        ClearMetadataAndDocStringPass()(model)  # which names files of this machine
        proto = onnx_ir.to_proto(model)
        quantize(proto, path, "int8" if path.stem.startswith("embed_tokens") and precision == "int4" else precision)


def quantize(proto: Any, path: Path, precision: str) -> None:
    """Writes a graph with its matrices in a precision. Convolutions and norms stay in float32: they are small."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if precision == "int8":
        # Unsigned: where a CPU has no VNNI, products of unsigned activations and signed weights overflow 16 bits
        quantize_dynamic(
            proto, path, op_types_to_quantize=["MatMul", "Gather"], per_channel=True, weight_type=QuantType.QUInt8
        )
    else:
        if precision == "int4":
            quantizer: Any = MatMulNBitsQuantizer(proto, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=4)
            quantizer.process()
            proto = quantizer.model.model
        onnx.save(proto, path)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without the warnings of exporter and quantizers, about their own old ways and what is absent but not needed."""
    root = logging.root
    before, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.setLevel(level)  # which importing the quantizers changes
        root.handlers[:] = handlers


# --- Files around them -----------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def runtime_config(model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    """`config.json` of transformers.js, which reads the form of the cache and the image token from it."""
    text = library_config(model.config.get_text_config()).to_dict()
    if not hasattr(model.model, "vision_tower"):
        architecture = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM"}
        config = text | {"architectures": [architecture[text["model_type"]]]}
    else:
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_id": model.config.image_token_id,
            "image_token_index": model.config.image_token_id,  # its older name
            "image_seq_length": model.config.image_seq_length,
            "text_config": text,
            "vision_config": model.config.vision_config.to_dict(),
        }
    return config | {"transformers.js_config": {"dtype": dtype}}


def write_processor(processor: MiniMindVProcessor, config: PreTrainedConfig, folder: Path) -> None:
    """The image processor, and LLaVA's rule for the number of tokens of an image."""
    images = processor.image_processor.to_dict() | {"processor_class": "LlavaProcessor"}
    write_json(folder / "preprocessor_config.json", {k: v for k, v in images.items() if k != "auto_map"})
    tower = config.vision_config
    rule = {
        "processor_class": "LlavaProcessor",
        "image_token": processor.image_token,
        "patch_size": tower.patch_size,
        # Besides one for each patch: CLS, or less than none where patches are merged
        "num_additional_image_tokens": config.image_seq_length - (tower.image_size // tower.patch_size) ** 2,
    }
    write_json(folder / "processor_config.json", rule)


def check_graphs(checkpoint: str | Path, folder: Path, precision: str) -> str:
    """Asks both."""
    from .onnxruntime_chat import OnnxModel

    model = OnnxModel(folder)
    model.suppress_tokens = []  # as the checkpoint is asked

    def answer(question: Question) -> list[int]:
        pixel_values = question.inputs.get("pixel_values")
        features = None if pixel_values is None else model.encode_images(pixel_values.numpy())
        return list(model.generate(question.inputs["input_ids"][0].tolist(), features, MAX_NEW_TOKENS))

    return compare_answers(checkpoint, answer, is_exact=precision == "float32")
