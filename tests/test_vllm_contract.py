"""What vLLM's Transformers modeling backend relies on, asserted without vLLM.

Each test names the file of vLLM 0.32.0 that it was read in, below vllm/; `backend` is model_executor/models/
transformers. `benchmarks/engines/ask_vllm.py` asks the real one.
"""

import ast
import inspect
import re
import textwrap

import pytest
import torch
from conftest import IDS, KINDS, make_config, make_model, make_text_config, picture
from safetensors import safe_open
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minimind_v import MiniMindForCausalLM

FORMS = [make_text_config, *(lambda tower=tower, moe=moe: make_config(tower, moe) for tower, moe in KINDS)]
FORM_IDS = ["text", *IDS]


@pytest.fixture(params=KINDS, ids=IDS)
def model_and_processor(request, make_processor):
    tower, moe = request.param
    return make_model(tower, moe).model, make_processor(tower)


def saved_config(config, folder):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


# --- Which of its classes vLLM takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FORMS, ids=FORM_IDS)
def test_class_of_the_model_is_found_and_compatible(make):
    """model_executor/models/registry.py, _try_resolve_transformers: classes by the prefixes of auto_map's names."""
    config = make()
    auto_map = config.to_dict()["auto_map"]
    assert {"AutoConfig", "AutoModel"} <= auto_map.keys()
    model = AutoModel.from_config(config)
    assert model.is_backend_compatible() and model._can_set_attn_implementation()


@pytest.mark.parametrize("make", FORMS, ids=FORM_IDS)
def test_configuration_tells_images_and_experts(make, tmp_path):
    """config/model.py, _get_transformers_backend_cls, and transformers_utils/model_arch_config_convertor.py,
    get_num_experts: a nested config means images, the first of four names that is there counts the experts."""
    config = saved_config(make(), tmp_path)
    text = config.get_text_config()
    assert (text is config) == (config.model_type == "minimind")
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    experts = next((getattr(text, name) for name in names if hasattr(text, name)), 0)
    model = AutoModel.from_config(config)
    sizes = {
        len(layer.mlp.experts.gate_up_proj) for layer in model.get_decoder().layers if hasattr(layer.mlp, "experts")
    }
    assert sizes == ({experts} if experts else set())


# --- Images ----------------------------------------------------------------------------------------------------------


def process(processor, *images):
    """As backend/multimodal.py, _apply_hf_processor_main, calls a processor."""
    text = processor.image_token * len(images)  # MultiModalDummyInputsBuilder.get_dummy_text
    return processor(text=text, images=list(images), return_text_replacement_offsets=True, return_tensors="pt")


def fields_of_images(inputs):
    """What of it belongs to the images, and goes to the model: the same, and _get_mm_fields_config."""
    others = ("attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets", "input_ids")
    return {name: value for name, value in inputs.items() if name not in others}


def test_placeholders_are_replaced_by_one_token_per_feature(model_and_processor):
    """backend/multimodal.py, _apply_hf_processor_main, _get_prompt_updates and _get_embed_token_id."""
    model, processor = model_and_processor
    offsets = process(processor, picture(0), picture(1))["text_replacement_offsets"][0]
    assert [entry["type"] for entry in offsets] == ["image", "image"]
    for entry in offsets:
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert ids == [model.config.image_token_id] * model.config.image_seq_length
    target = processor.tokenizer.encode(processor.image_token, add_special_tokens=False)
    assert target == [model.config.image_token_id]  # what PromptReplacement looks for


@pytest.mark.parametrize("size", [[1, 1], [30, 40], [10_000, 10_000]], ids=str)
def test_tokens_and_rows_are_known_from_sizes(model_and_processor, size):
    """backend/multimodal.py, _get_num_image_tokens and _get_num_patches_per_image: for images of any size."""
    model, processor = model_and_processor
    counts = processor._get_num_multimodal_tokens(image_sizes=(size, size))
    assert counts["num_image_tokens"] == [model.config.image_seq_length] * 2
    assert counts["num_image_patches"] == [1, 1]


def test_processor_has_images_only(processor):
    """backend/multimodal.py, MultiModalProcessingInfo._get_supported_modalities: by these attributes."""
    assert hasattr(processor, "image_processor")
    assert not any(
        hasattr(processor, f"{name}") for name in ("video_processor", "audio_processor", "feature_extractor")
    )


def test_an_image_is_the_same_whatever_stands_beside_it(model_and_processor):
    """backend/multimodal.py, _get_field_config: rows of every field are cut per image, cached under the image's hash,
    and put together again with rows of other requests; so of NaFlex's mask and shapes, too."""
    _, processor = model_and_processor
    images = [picture(0), picture(1, (64, 20)), picture(2, (9, 50))]
    together, alone = fields_of_images(process(processor, *images)), [process(processor, image) for image in images]
    for name, values in together.items():
        assert len(values) == len(images) and isinstance(values, torch.Tensor)
        assert torch.equal(values, torch.cat([fields_of_images(inputs)[name] for inputs in alone]))


def test_image_features_are_asked_for_by_name(model_and_processor):
    """backend/multimodal.py, _process_image_input and _get_features: pixel_values by position, all other fields of the
    processor by name, and `pooler_output` one tensor per image."""
    model, processor = model_and_processor
    fields = fields_of_images(process(processor, picture(0), picture(1)))
    features = model.get_image_features(fields.pop("pixel_values"), return_dict=True, **fields).pooler_output
    assert not isinstance(features, torch.Tensor)  # else it would be cut by num_image_patches
    shape = (model.config.image_seq_length, model.config.text_config.hidden_size)
    assert [tuple(feature.shape) for feature in features] == [shape, shape]


def test_parts_of_the_model(model_and_processor):
    """backend/multimodal.py, _find_encoder_classes, get_language_model and get_mm_mapping; backend/base.py,
    _pre_trained_model_classes."""
    model, _ = model_and_processor
    assert model.get_encoder(modality="image") is model.vision_tower
    assert model.get_decoder() is model.language_model
    assert model.get_input_embeddings() is model.language_model.embed_tokens


# --- The decoder -----------------------------------------------------------------------------------------------------


def calls_of_the_attention_interface(forward):
    """As backend/fusers/attention.py, interface_call: vLLM reads the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))

    def is_lookup(node):
        node = node.func if isinstance(node, ast.Call) else node
        value = node.value if isinstance(node, (ast.Attribute, ast.Subscript)) else None
        return isinstance(value, ast.Name) and value.id == "ALL_ATTENTION_FUNCTIONS"

    assigned = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    assigned = [node for node in assigned if is_lookup(node.value)]
    targets = [target for node in assigned for target in getattr(node, "targets", None) or [node.target]]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [node for node in calls if node.func.id in names]


@pytest.mark.parametrize("make", FORMS, ids=FORM_IDS)
def test_attention_is_recognised_by_its_source(make):
    """backend/fusers/attention.py, AttentionFuser: one call of the interface, whose scaling can be read off the
    module; layers are told apart by `layer_idx`. backend/fusers/qkv.py: three linears of these names."""
    decoder = AutoModel.from_config(make()).get_decoder()
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        (call,) = calls_of_the_attention_interface(type(attention).forward)
        (scaling,) = [keyword.value for keyword in call.keywords if keyword.arg == "scaling"]
        assert ast.unparse(scaling) == "self.scaling"
        assert attention.scaling == pytest.approx(decoder.config.head_dim**-0.5)
        assert attention.layer_idx == index and attention.is_causal
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        assert all(type(linear) is torch.nn.Linear for linear in linears)


@pytest.mark.parametrize("make", FORMS, ids=FORM_IDS)
def test_forward_reaches_another_attention_with_all_arguments(make):
    """backend/base.py, _patch_config and forward: the text config's implementation is another one before the model is
    made, and one row of embeddings comes with positions, without mask and cache, as a tuple back."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, attention_mask, kwargs.get("of_vllm")))
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    AttentionInterface.register("recorded", attention)
    config = make()
    config.get_text_config()._attn_implementation = "recorded"
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    embeddings, positions = torch.randn(1, 7, config.get_text_config().hidden_size), torch.arange(7)[None]
    options = {"position_ids": positions, "use_cache": False, "return_dict": False}
    outputs = model(input_ids=None, inputs_embeds=embeddings, of_vllm="passed on", **options)
    assert seen == [(layer, None, "passed on") for layer in range(config.get_text_config().num_hidden_layers)]
    model.get_decoder().config._attn_implementation = "sdpa"
    expected = model(inputs_embeds=embeddings, return_dict=True).last_hidden_state
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], expected)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_form_of_the_experts(tower):
    """backend/moe.py, recursive_replace: a child `experts` of which every parameter has three dimensions, and their
    sizes in the text config. backend/fusers/moe.py, _match_router: a gate that has
    nothing but `weight`; _returns_tuple: the block gives hidden states only."""
    config = make_config(tower, moe=True)
    text = config.text_config
    model = AutoModel.from_config(config)
    assert model._can_set_experts_implementation()  # @use_experts_implementation, found in the source of our file
    for layer in model.language_model.layers:
        block = layer.mlp
        shapes = {name: tuple(value.shape) for name, value in block.experts.named_parameters()}
        width, hidden = text.moe_intermediate_size, text.hidden_size
        up = (text.num_experts, 2 * width, hidden)
        assert shapes == {"gate_up_proj": up, "down_proj": (text.num_experts, hidden, width)}
        assert [name for name, _ in block.gate.named_parameters()] == ["weight"]
        assert isinstance(block(torch.zeros(1, 2, hidden)), torch.Tensor)
    # vLLM would add shared experts of these names itself; ours run in our block.
    assert not hasattr(text, "n_shared_experts") and not hasattr(text, "moe_num_shared_experts")


@pytest.mark.parametrize("make", FORMS, ids=FORM_IDS)
def test_plans_name_what_is_there(make):
    """backend/base.py, recursive_replace and pipeline_parallel: `tp_plan` and `_pp_plan` of the model without head."""
    model = AutoModel.from_config(make())
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    assert model.tp_plan and model.supports_pp_plan
    for pattern in model.tp_plan:
        expression = re.escape(pattern).replace(r"\*", r"\d+")
        assert any(re.fullmatch(expression, name) for name in names), pattern
    lists = [name for name in model._pp_plan if isinstance(model.get_submodule(name), torch.nn.ModuleList)]
    assert lists == [name for name in model._pp_plan if name.endswith("layers")] and len(lists) == 1


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("is_text", [True, False], ids=["text", "images"])
def test_output_matrix_is_tied_where_the_config_says_so(is_text, tied, tmp_path):
    """backend/base.py, _get_tie_word_embeddings: tied if the config or its text config says so."""
    if is_text:
        model = MiniMindForCausalLM(make_text_config(tie_word_embeddings=tied))
    else:
        model = AutoModelForCausalLM.from_config(make_config("siglip", tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert {config.tie_word_embeddings, config.get_text_config().tie_word_embeddings} == {tied}
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert ("lm_head.weight" in set(weights.keys())) == (not tied)


@pytest.mark.parametrize("tower, moe", KINDS, ids=IDS)
def test_names_of_the_weights(tower, moe, tmp_path):
    """backend/base.py, _create_hf_to_vllm_mapper: those of the model without head, after "model.", and the head's."""
    model = make_model(tower, moe)
    model.save_pretrained(tmp_path)
    assert model.model.base_model_prefix == "model"
    expected = {f"model.{name}" for name in model.model.state_dict()}
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) - {"lm_head.weight"} == expected
