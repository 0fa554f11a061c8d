"""The converter: round trips, real sizes, tokenizers, hostile and interrupted input. (Its numbers: test_golden.py)"""

import itertools
import json
import os
import pickle
import re
import shutil

import PIL
import pytest
import torch
from conftest import picture
from original import (
    CASES,
    GOLDEN,
    GOLDEN_IDS,
    TOKENIZERS,
    convert_case,
    load_case,
    our_input_ids,
    read_json,
    recorded,
    recorded_images,
    release_of,
    with_image_token,
)
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from test_travel import run_elsewhere
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from minimind_v import MiniMindForCausalLM, MiniMindVConfig, MiniMindVForConditionalGeneration
from minimind_v.common import WeightsError
from minimind_v.conversion import RELEASES, convert_checkpoint
from minimind_v.conversion.configurations import read_arguments, text_config
from minimind_v.conversion.convert import fill_model, vision_language_config
from minimind_v.conversion.key_maps import detect_release, from_original, ignored_reason, rename
from minimind_v.conversion.tokenizers import wrap_tokenizer
from minimind_v.export import export_text_backbone, export_to_original
from minimind_v.processing_minimind_v import GUARD
from minimind_v_cli.__main__ import main

# --- There and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_export_gives_back_the_original_tensors(case, tmp_path):
    ours = convert_case(case)
    exported = torch.load(export_to_original(ours, tmp_path / "back.pth").output, weights_only=True)
    original = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    assert exported.keys() == {name for name in original if not name.startswith("vision_encoder.")}
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name]) and tensor.dtype == original[name].dtype, name
    with_tower = torch.load(
        export_to_original(ours, tmp_path / "tower.pth", include_tower=True).output, weights_only=True
    )
    for name in with_tower.keys() - exported.keys():
        assert name not in original or torch.equal(with_tower[name], original[name])
    again = convert_checkpoint(
        tmp_path / "back.pth",
        tmp_path / "again",
        vision_encoder=GOLDEN / case / "vision_encoder",
        original_config=read_json(f"{case}/hparams.json")["constructor_args"],
    ).output
    first, second = (load_file(folder / "model.safetensors") for folder in (ours, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_text_backbone_is_a_model_of_the_library(case, tmp_path):
    model, hparams = load_case(case)
    if hparams["moe"] and not case.startswith("g3"):
        with pytest.raises(ValueError, match="No model of the library computes MiniMind2's experts"):
            export_text_backbone(convert_case(case), tmp_path / "text")
        assert not (tmp_path / "text").exists()
        return
    folder = export_text_backbone(convert_case(case), tmp_path / "text").output
    backbone = AutoModelForCausalLM.from_pretrained(folder).eval()
    kind = "Qwen3Moe" if hparams["moe"] else "Qwen3" if case.startswith("g3") else "Llama"
    assert type(backbone).__name__ == kind + "ForCausalLM"
    ids = torch.randint(40, 190, (2, 20))
    assert (backbone(ids).logits - model(ids).logits).abs().max() == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<|image_pad|>").input_ids == [model.config.image_token_id] and tokenizer("你好").input_ids


def test_early_and_later_release_of_the_same_weights_agree():
    """Both names of one tensor set: the row order of q and k is the only difference."""
    state = torch.load(GOLDEN / "g1_dense" / "upstream.pth", weights_only=True)
    args = read_json("g1_dense/hparams.json")["constructor_args"]
    early, _ = load_case("g1_dense")
    later = {rename(name, "minimind2-early"): tensor for name, tensor in state.items() if not ignored_reason(name)}
    rotated = from_original({n: t for n, t in state.items() if not ignored_reason(n)}, "minimind2-early", 12)
    changed = {name for name in later if not torch.equal(later[name], rotated[name])}
    assert changed and all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in changed)
    assert early.config.text_config.head_dim == args["dim"] // args["n_heads"]


# --- Other forms of input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_folder_in_the_originals_transformers_form(shards, tmp_path):
    """Weights, configuration and tokenizer in one folder give what file, `--config` and `--tokenizer` give."""
    state = torch.load(GOLDEN / "g3v_dense" / "upstream.pth", weights_only=True)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((GOLDEN / "tokenizers" / "minimind3" / name).read_bytes())
    (source / "config.json").write_text(json.dumps(read_json("g3v_dense/hparams.json")["constructor_args"]))
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
        for shard in set(weight_map.values()):
            torch.save({name: state[name] for name in state if weight_map[name] == shard}, source / shard)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tower, expected = GOLDEN / "g3v_dense" / "vision_encoder", convert_case("g3v_dense")
    output = convert_checkpoint(source, tmp_path / "out", vision_encoder=tower).output
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("case", recorded("g0_dense_hf", "g3i_dense_hf", "g3v_dense_hf"))
def test_recorded_folder_in_the_originals_transformers_form(case, tmp_path):
    """`pytorch_model.bin`, for G3i and G4 in bfloat16, and the numbers that it gives in float32."""
    origin = case.removesuffix("_hf")
    hparams = read_json(f"{origin}/hparams.json")
    release = release_of(hparams)
    summary = convert_checkpoint(
        GOLDEN / case,
        tmp_path / "out",
        vision_encoder=GOLDEN / origin / "vision_encoder",
        tokenizer=GOLDEN / "tokenizers" / TOKENIZERS[release],
    )
    assert summary.release == release
    stored = load_file(summary.output / "model.safetensors")
    dtype = torch.float32 if case == "g0_dense_hf" else torch.bfloat16
    assert stored["model.language_model.norm.weight"].dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(summary.output, dtype=torch.float32).eval()
    inputs = load_file(GOLDEN / origin / "inputs.safetensors")
    recorded_in = case if (GOLDEN / case / "expected.safetensors").exists() else origin
    expected = load_file(GOLDEN / recorded_in / "expected.safetensors")
    for sub_case in ("text", "one_image"):
        options = recorded_images(inputs, sub_case, hparams) if sub_case == "one_image" else {}
        with torch.no_grad():
            logits = model(our_input_ids(inputs[f"{sub_case}.input_ids"], hparams), **options).logits
        torch.testing.assert_close(logits.logsumexp(-1), expected[f"{sub_case}.logsumexp"], atol=2e-4, rtol=1e-4)
        if f"{sub_case}.logits_cols" in expected:
            columns = logits[..., inputs["cols"]]
            torch.testing.assert_close(columns, expected[f"{sub_case}.logits_cols"], atol=2e-4, rtol=1e-4)
    assert str(GOLDEN) not in (summary.output / "config.json").read_text()
    processor = AutoProcessor.from_pretrained(summary.output)
    assert processor.image_seq_length == hparams["image_token_len"]
    assert processor.image_token_id == model.config.image_token_id


@pytest.mark.parametrize("case", [*recorded("g0_dense", "g3i_moe", "g3p_dense"), "g2_moe", "g3v_moe"])
def test_stripped_half_precision_and_prefixed_tensors(case, tmp_path):
    """As the original's training scripts save: no tower, float16; here also with the prefix of torch.compile."""
    state = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    half = {f"_orig_mod.{k}": v.half() for k, v in state.items() if not k.startswith("vision_encoder.")}
    half["_orig_mod.mask"] = torch.zeros(1)
    torch.save(half, tmp_path / "half.pth")
    options = {"original_config": read_json(f"{case}/hparams.json")["constructor_args"]}
    with pytest.raises(ValueError, match=r"no vision tower.*--vision-encoder"):
        convert_checkpoint(tmp_path / "half.pth", tmp_path / "out", **options)
    options["vision_encoder"] = GOLDEN / case / "vision_encoder"
    summary = convert_checkpoint(tmp_path / "half.pth", tmp_path / "out", **options)
    assert summary.release == release_of(read_json(f"{case}/hparams.json"))
    assert "ignored 1 tensors: masks" in str(summary) and "float16 and float32, kept as they are" in str(summary)
    stored = load_file(summary.output / "model.safetensors")
    assert stored["model.language_model.embed_tokens.weight"].dtype == torch.float16
    whole = convert_checkpoint(tmp_path / "half.pth", tmp_path / "bf16", **options, dtype=torch.bfloat16).output
    assert {t.dtype for t in load_file(whole / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", [*recorded("g0_dense"), "g1_dense", "g3v_moe"])
def test_text_only_checkpoint(case, tmp_path):
    hparams = read_json(f"{case}/hparams.json")
    state = torch.load(GOLDEN / case / "upstream.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("vision_")}, tmp_path / "llm.pth")
    options = {"original_config": hparams["constructor_args"]}
    options["tokenizer"] = GOLDEN / "tokenizers" / TOKENIZERS[release_of(hparams)]
    text = convert_checkpoint(tmp_path / "llm.pth", tmp_path / "text", **options).output
    model = AutoModelForCausalLM.from_pretrained(text).eval()
    assert type(model) is MiniMindForCausalLM
    expected = load_file(GOLDEN / case / "expected.safetensors")["text.logits"]
    ids = load_file(GOLDEN / case / "inputs.safetensors")["text.input_ids"]
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-4)
    options["vision_encoder"] = GOLDEN / case / "vision_encoder"
    summary = convert_checkpoint(tmp_path / "llm.pth", tmp_path / "vlm", **options)
    assert "the projector is new" in str(summary)
    start = AutoModelForCausalLM.from_pretrained(summary.output)
    assert type(start) is MiniMindVForConditionalGeneration
    torch.testing.assert_close(start.eval()(ids).logits, expected, atol=2e-4, rtol=1e-4)
    projector = dict(start.model.multi_modal_projector.named_parameters())
    assert projector and all(parameter.isfinite().all() for parameter in projector.values())


@pytest.mark.parametrize("kind", ["clip", "naflex"])
def test_tower_in_the_checkpoint_needs_no_folder(kind, tmp_path):
    """The tower's sizes are read from its tensors; random ones, with the usual head size of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1}
    if kind == "clip":
        fields = {"vision_config": CLIPVisionConfig(**sizes, patch_size=16), "projector_type": "linear"}
    else:
        fields = {"vision_config": Siglip2VisionConfig(**sizes, patch_size=8, num_patches=64, vision_use_head=False)}
        fields |= {"projector_norm": False, "projector_merge_size": 4}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "use_qk_norm": kind == "naflex", "intermediate_size": 64}
    model = MiniMindVForConditionalGeneration(MiniMindVConfig(text_config=text, image_token_id=190, **fields))
    model.save_pretrained(tmp_path / "ours")
    export_to_original(tmp_path / "ours", tmp_path / "full.pth", include_tower=True)
    summary = convert_checkpoint(tmp_path / "full.pth", tmp_path / "out")
    activation = {"clip": "quick_gelu", "naflex": "gelu_pytorch_tanh"}[kind]
    assert f"tower: 1 heads, activation {activation}" in str(summary) and "no tokenizer was given" in str(summary)
    loaded, vision = AutoModelForCausalLM.from_pretrained(summary.output), summary.config.vision_config
    if kind == "clip":
        assert (vision.image_size, vision.patch_size, loaded.config.image_seq_length) == (224, 16, 196)
    else:
        assert (vision.num_patches, vision.patch_size, loaded.config.image_seq_length) == (64, 8, 16)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


# --- Real sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, release, millions",
    [
        ("g0_512x8", "minimind1", 26.88),
        ("g0_768x16", "minimind1", 108.75),
        ("g1_512x8", "minimind2-early", 25.83),
        ("g1_768x16", "minimind2-early", 104.03),
        ("g2_512x8", "minimind2", 25.83),
        ("g2_768x16", "minimind2", 104.03),
        ("g3i_768x8", "minimind3-naflex", 63.91),
        ("g3i_moe_768x8", "minimind3-naflex", 198.42),
        ("g3p_768x8", "minimind3-p16", 63.91),
        ("g3p_moe_768x8", "minimind3-p16", 198.42),
        ("g3v_768x8", "minimind3", 63.91),
        ("g3v_moe_768x8", "minimind3", 198.42),
    ],
)
def test_released_sizes(file, release, millions):
    """Recorded names and shapes, on the meta device: none left over, none missing, and the published sizes."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in read_json(f"keys_{file}.json").items()}
    assert detect_release({name: tensor.shape for name, tensor in state.items()}, {}) == [release]
    state = {name: tensor for name, tensor in state.items() if not ignored_reason(name)}
    shapes = {rename(name, release): tensor.shape for name, tensor in state.items()}
    decoder, _ = text_config(shapes, release, {})
    tower = {
        "minimind1": CLIPVisionConfig(patch_size=32),
        "minimind3-naflex": Siglip2VisionConfig(vision_use_head=False),
        "minimind3-p16": SiglipVisionConfig(image_size=256, patch_size=16, vision_use_head=False),
        "minimind3": MiniMindVConfig().vision_config,
    }.get(release, CLIPVisionConfig(patch_size=16))
    mapped = from_original(state, release, decoder.head_dim)
    config = vision_language_config(decoder, tower, mapped)
    assert config.image_seq_length == {"minimind1": 50, "minimind2-early": 196, "minimind2": 196}.get(release, 64)
    del mapped["lm_head.weight"]
    with torch.device("meta"):
        model = MiniMindVForConditionalGeneration(config)
    if not any("vision_tower" in name for name in mapped):  # not in the checkpoints of all releases
        mapped |= {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name}
    filled = fill_model(config, mapped)
    count = sum(parameter.numel() for parameter in filled.model.language_model.parameters())
    assert round(count / 1e6, 2) == millions


# --- Which release it is ---------------------------------------------------------------------------------------------

EARLY_ARGUMENTS = {"dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


@pytest.mark.parametrize(
    "heads, arguments, releases",
    [
        ((2, 1), {}, ["minimind1"]),  # query heads per key head, as released
        ((4, 1), {}, ["minimind2-early"]),
        ((2, 1), {"n_heads": 4}, ["minimind1"]),
        ((2, 1), EARLY_ARGUMENTS, ["minimind1"]),
        ((2, 1), EARLY_ARGUMENTS | {"rope_theta": 5e4}, ["minimind2-early"]),
        ((2, 1), {"image_special_token": "@" * 196}, ["minimind2-early"]),
        ((2, 1), {"image_ids": [34] * 196}, ["minimind2-early"]),
        ((4, 1), {"image_special_token": "<" * 25 + ">" * 25}, ["minimind1"]),
        ((4, 1), {"image_ids": [30] * 25 + [32] * 25}, ["minimind1"]),
        ((1, 1), EARLY_ARGUMENTS, ["minimind1"]),
        ((1, 1), {}, ["minimind1", "minimind2-early"]),  # nothing tells
        ((4, 1), EARLY_ARGUMENTS, ["minimind1", "minimind2-early"]),  # one sign against the other
    ],
)
def test_the_two_first_releases_are_told_apart(heads, arguments, releases):
    shapes = {"tok_embeddings.weight": torch.Size((64, 12))}
    shapes |= {
        f"layers.0.attention.{name}.weight": torch.Size((12 * count, 12))
        for name, count in zip(("wq", "wk"), heads, strict=True)
    }
    assert detect_release(shapes, arguments) == releases


@pytest.mark.parametrize(
    "norm, arguments, tower_width, releases",
    [
        (768, {}, None, ["minimind3"]),  # as released
        (3072, {}, None, ["minimind3-p16"]),
        (64, {}, 64, ["minimind3"]),
        (64, {}, 16, ["minimind3-p16"]),
        (64, {"image_hidden_size": 16}, None, ["minimind3-p16"]),
        (64, {"image_hidden_size": 64}, None, ["minimind3"]),
        (64, {}, None, ["minimind3-p16", "minimind3"]),
    ],
)
def test_merged_patches_tell_the_release(norm, arguments, tower_width, releases):
    shapes = {"model.embed_tokens.weight": torch.Size((64, 12)), "vision_proj.mlp.0.weight": torch.Size((norm,))}
    assert detect_release(shapes, arguments, tower_width) == releases


@pytest.mark.parametrize("case", [*recorded("g3p_dense"), "g3v_dense"])
def test_tower_tells_the_release(case, tmp_path):
    """The one that is named, or the one in the checkpoint; without arguments."""
    tower, release = GOLDEN / case / "vision_encoder", release_of(read_json(f"{case}/hparams.json"))
    assert convert_checkpoint(GOLDEN / case / "upstream.pth", tmp_path / "1", vision_encoder=tower).release == release
    export_to_original(tmp_path / "1", tmp_path / "whole.pth", include_tower=True)
    assert convert_checkpoint(tmp_path / "whole.pth", tmp_path / "2", vision_encoder=tower).release == release


def test_release_that_nothing_tells_must_be_said(tmp_path):
    """Both releases are named, and how to say which; with the release, the numbers are that release's."""
    state = torch.load(GOLDEN / "g1_dense" / "upstream.pth", weights_only=True)
    for name in [name for name in state if name.endswith(("wk.weight", "wv.weight"))]:
        state[name] = state[name].repeat(2, 1)  # as many key heads as query heads, like neither release
    torch.save(state, tmp_path / "sft.pth")
    options = {"vision_encoder": GOLDEN / "g1_dense" / "vision_encoder", "original_config": {"n_heads": 4}}
    with pytest.raises(ValueError, match=r"minimind1 or minimind2-early, .* Say which with --release, .* --config"):
        convert_checkpoint(tmp_path / "sft.pth", tmp_path / "out", **options)
    for release, theta in (("minimind1", 1e4), ("minimind2-early", 1e6)):
        summary = convert_checkpoint(tmp_path / "sft.pth", tmp_path / release, release=release, **options)
        assert summary.release == release and summary.config.text_config.rope_parameters["rope_theta"] == theta
        assert summary.config.image_seq_length == {"minimind1": 197}.get(release, 196)  # with CLS


@pytest.mark.parametrize(
    "case, tower", [("g0_dense", "g3v_dense"), ("g3i_dense", "g3p_dense"), ("g3p_dense", "g3i_dense")]
)
def test_tower_of_another_release_is_refused(case, tower, tmp_path):
    if not recorded(case, tower)[1:]:
        pytest.skip("recorded in ../shared/golden only")
    with pytest.raises(ValueError, match=r"The vision tower of minimind.* is a .*; it cannot be a "):
        convert_checkpoint(
            GOLDEN / case / "upstream.pth",
            tmp_path / "out",
            vision_encoder=GOLDEN / tower / "vision_encoder",
            original_config=read_json(f"{case}/hparams.json")["constructor_args"],
        )


# --- Tokenizers and images ------------------------------------------------------------------------------------------

WITH_TOKENIZER = [
    name
    for name in ("minimind1", "minimind2-early", "minimind2", "minimind3")
    if (GOLDEN / "tokenizers" / TOKENIZERS[name]).is_dir()
]


@pytest.mark.parametrize("release", WITH_TOKENIZER)
def test_tokenizer_parity(release):
    """Every recorded rendering, id and decoding, and the same chats written as lists of parts.

    An image is `<|image_pad|>` in every release; MiniMind2's recorded `@` runs stand for it.
    """
    tokenizer = wrap_tokenizer(GOLDEN / "tokenizers" / TOKENIZERS[release], release, 32768)
    tokenizer.chat_template = GUARD.sub("", tokenizer.chat_template)  # the recorded texts hold image tokens
    records = read_json(f"tokenizers/parity_{TOKENIZERS[release]}.json")
    marker, original = records["image_marker"], records["image_text"] * records["image_repeat"]
    placeholder = records.get("image_token_ids") or [records["image_token_id"]] * records["image_repeat"]
    length = len(placeholder)
    ours = "<|image_pad|>" * length
    compared = 0
    for chat in records["conversations"]:
        messages = [dict(message) for message in chat["messages"]]
        parts = [dict(message) for message in chat["messages"]]
        for message, with_parts in zip(messages, parts, strict=True):
            if message["role"] != "system" and message.get("content"):
                pieces = re.split(f"({re.escape(marker)})", message["content"])
                with_parts["content"] = [
                    {"type": "image"} if piece == marker else {"type": "text", "text": piece} for piece in pieces
                ]
                message["content"] = message["content"].replace(marker, ours)
        for render in chat["render"]:
            expected = chat["render"][render["same_as"]] if "same_as" in render else render
            expected_text = expected["text"].replace(original, ours)
            options = {"tokenize": False, "tools": chat.get("tools"), **render["kwargs"]}
            text = tokenizer.apply_chat_template(messages, **options)
            assert text == expected_text
            expected_ids = with_image_token(expected["ids"], release, placeholder)
            if " " + original not in expected["text"]:  # there, minimind1's image was lost to a token of " <"
                assert tokenizer(text)["input_ids"] == expected_ids
            if "tool_response" not in str(messages):
                with_images = tokenizer.apply_chat_template(parts, **options)
                assert with_images.count("<|image_pad|>") == expected_text.count("<|image_pad|>") // length
                assert with_images.replace("<|image_pad|>", ours) == expected_text
            compared += 1
    for raw in records["raw"]:
        ids = tokenizer(raw["text"])["input_ids"]
        assert ids.count(tokenizer.image_token_id) == raw["text"].count("<|image_pad|>")
        if release == "minimind3" or "<|image_pad|>" not in raw["text"]:  # to the original's MiniMind2 it was text
            assert ids == raw["ids"]
        assert tokenizer.decode(raw["ids"]) == raw["decoded"]
        assert tokenizer.decode(raw["ids"], skip_special_tokens=True) == raw["decoded_skip_special"]
    assert compared >= 58


@pytest.mark.parametrize("release", WITH_TOKENIZER)
def test_image_token_takes_no_id_from_text(release, tmp_path):
    """Text of every kind of byte sequence, and each single token, as with the original's tokenizer."""
    source = GOLDEN / "tokenizers" / TOKENIZERS[release]
    original = PreTrainedTokenizerFast.from_pretrained(source)
    wrap_tokenizer(source, release, 32768).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    image_id = {"minimind3": 12}.get(release, 190)
    assert len(tokenizer) == len(original) == 6400 and tokenizer.vocab_size == original.vocab_size
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == tokenizer.image_token_id == image_id
    assert image_id in tokenizer.all_special_ids and tokenizer.decode([image_id], skip_special_tokens=True) == ""
    others = [token_id for token_id in range(6400) if token_id != image_id]
    assert tokenizer.convert_ids_to_tokens(others) == original.convert_ids_to_tokens(others)
    texts = ["".join(map(chr, range(start, start + 64))) for start in range(0, 0xD7C0, 64)]
    texts += ["me@home.org", "@" * 196, "ÿ", "ÿ@ÿ", "\U0001f600", "\U0010ffff"]
    ids = tokenizer(texts)["input_ids"]
    assert ids == original(texts)["input_ids"] and not any(image_id in row for row in ids)


def test_tokenizer_of_another_release_is_refused():
    with pytest.raises(ValueError, match=r"is not that of minimind3: the id of <\|image_pad\|> is None instead of 12"):
        wrap_tokenizer(GOLDEN / "tokenizers" / "minimind2_im", "minimind3", 32768)
    with pytest.raises(ValueError, match=r"is not that of minimind2: the id of <\|image_pad\|> is 12 instead of 190"):
        wrap_tokenizer(GOLDEN / "tokenizers" / "minimind3", "minimind2", 32768)


@pytest.mark.parametrize("release", WITH_TOKENIZER)
def test_training_labels(release):
    """What the generation blocks of the template mark is what the original trains on."""
    tokenizer = wrap_tokenizer(GOLDEN / "tokenizers" / TOKENIZERS[release], release, 32768)
    tokenizer.chat_template = GUARD.sub("", tokenizer.chat_template)  # the recorded texts hold image tokens
    records = read_json(f"tokenizers/parity_{TOKENIZERS[release]}.json")
    compared, by_index = 0, {chat["index"]: chat for chat in records["conversations"]}
    placeholder = records.get("image_token_ids") or [records["image_token_id"]] * records["image_repeat"]
    for row in records["training"]:
        chat = by_index[row["index"]]
        if release == "minimind2-early" and chat["messages"][-1]["role"] != "assistant":
            continue  # without an answer at its end, the first release trains on everything up to max_length
        # The original's data set takes nothing but role and content.
        messages = [{"role": message["role"], "content": message["content"]} for message in chat["messages"]]
        if row.get("dataset") == "SFTDataset":
            messages = messages[:2]  # the first question and its answer
        for message in messages:
            # (One of minimind1's data sets puts images into questions only, and no answer holds one in the others.)
            if message["role"] == "user" or (release != "minimind1" and message["role"] != "system"):
                ours = "<|image_pad|>" * len(placeholder)
                message["content"] = message["content"].replace(records["image_marker"], ours)
        encoded = tokenizer.apply_chat_template(
            messages, tools=chat.get("tools"), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        length = row["max_length"]
        if release == "minimind1" and len(encoded["input_ids"]) > length:
            continue  # it trains on something else where it has cut the last header off; we leave such rows out
        compared += 1
        ids = (encoded["input_ids"] + [tokenizer.pad_token_id] * length)[:length]
        mask = (list(encoded["assistant_masks"]) + [0] * length)[:length]
        # The recorded rows may end inside an image, so ours are written as the original's, not the other way round.
        image = itertools.cycle(placeholder)
        ids = [next(image) if token == tokenizer.image_token_id else token for token in ids]
        assert ids == row["input_ids"]
        labels = [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]
        if release == "minimind1":  # its loss leaves out the id 0, <unk>, which no text of ours becomes
            labels = [token if token != 0 else -100 for token in labels]
        expected = row["labels"] if release == "minimind3" else row["equivalent_labels"]
        if release != "minimind2-early":
            assert labels == expected
        else:  # the first release trained one token too late: not on the first of an answer, but on the one after it
            late = [0, *mask[:-1]]
            assert [token if keep else -100 for token, keep in zip(ids, late, strict=True)] == expected
    assert compared >= 8


@pytest.mark.parametrize(
    "case, family",
    [
        *(("g2_moe", "clip"), ("g3v_dense", "siglip")),
        *((case, "g0_eval") for case in recorded("g0_dense")),
        *((case, "naflex") for case in recorded("g3i_dense")),
        *((case, "siglip") for case in recorded("g3p_dense")),
    ],
)
def test_image_processor_grids(case, family):
    processor = AutoProcessor.from_pretrained(convert_case(case))
    file = "expected" if family in ("clip", "siglip") else "expected_g0_g3i"
    expected = load_file(GOLDEN / "images" / f"{file}.safetensors")
    paths = sorted((GOLDEN / "images").glob("*.png"))
    assert len(paths) == 3
    size = processor.image_processor.size if family in ("g0_eval", "siglip") else {}
    for path in paths:
        image = Image.open(path).convert("RGB")  # as the original: alpha is cut off, not put on white
        is_older = Version(PIL.__version__) < Version("13")
        if is_older and size and image.height > size["height"] and image.width < size["width"]:
            # Recorded with Pillow 13, which first resizes the axis that shrinks; in between it rounds to 8 bits
            image = image.resize((image.width, size["height"]), processor.image_processor.resample)
        inputs = processor(text=processor.image_token, images=image, return_tensors="pt")
        values, key = inputs["pixel_values"], f"{family}.{path.stem}"
        if family == "naflex":
            for name in ("spatial_shapes", "pixel_attention_mask"):
                assert torch.equal(inputs[name].long(), expected[f"{key}.{name}"].long())
            grid, pixels = values[:, 1::5, 5::11], values[0, inputs["pixel_attention_mask"][0] == 1].view(-1, 3)
        else:
            grid, pixels = values[:, :, 4::8, 4::8], values[0].flatten(1).T
        torch.testing.assert_close(grid.squeeze(0), expected[f"{key}.grid"].squeeze(0), atol=1e-5, rtol=1.3e-6)
        torch.testing.assert_close(pixels.mean(0), expected[f"{key}.mean"].flatten(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pixels.std(0), expected[f"{key}.std"].flatten(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", [*recorded("g0_dense", "g3i_dense", "g3p_dense"), "g1_dense", "g2_moe", "g3v_dense"])
def test_converted_checkpoint_answers_questions(case):
    """Processor and model together: a chat with an image and an e-mail address."""
    model, hparams = load_case(case)
    processor = AutoProcessor.from_pretrained(convert_case(case))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "me@home?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length, image_id = hparams["image_token_len"], model.config.image_token_id
    assert inputs["input_ids"].eq(image_id).sum() == processor.image_seq_length == length
    assert processor.image_token == "<|image_pad|>" and processor.image_token_id == image_id
    assert processor.tokenizer.padding_side == "left" and model.generation_config.suppress_tokens == [image_id]
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("case", [*recorded("g3i_dense"), "g2_moe", "g3v_dense"])
def test_converted_checkpoint_travels(case, tmp_path):
    """In a fresh process, without this package: still the recorded logits."""
    ids = load_file(GOLDEN / case / "inputs.safetensors")["text.input_ids"]
    program = """
import json, sys, torch
sys.modules["minimind_v"] = None
from transformers import AutoModelForCausalLM, AutoProcessor
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""
    logits = torch.tensor(run_elsewhere(program, convert_case(case), json.dumps(ids.tolist()), folder=tmp_path))
    expected = load_file(GOLDEN / case / "expected.safetensors")["text.logits"]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


# --- Hostile and interrupted input ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pickle-was-executed",))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"this is a text file", r"of tensors \(another kind, or cut off\)\. Name a \.pth"),
        (b"", "cannot be read as a checkpoint of tensors"),
        (b"PK\x03\x04 truncated", "cannot be read as a checkpoint of tensors"),
        (pickle.dumps(Evil()), "cannot be read as a checkpoint of tensors"),
        ("evil", r"of tensors \(it holds more than tensors, which could run code\)"),
        (["a", "list"], "does not hold a state dict"),
        ({"epoch": 3}, "does not hold a state dict"),
        ({"model": {"a": torch.zeros(1)}, "optimizer": {}}, "is not a checkpoint of MiniMind: its tensors .*'a'"),
        ({"bert.weight": torch.zeros(1)}, "is not a checkpoint of MiniMind"),
        ({}, "does not hold a state dict"),
    ],
    ids=str,
)
def test_files_that_are_no_checkpoints(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model.embed_tokens.weight": Evil()} if content == "evil" else content, path)
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file.pth"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"), r"missing: .*layers.1.self_attn.k_proj"),
        (lambda s: s.pop("model.layers.0.self_attn.k_proj.weight"), r"Missing tensor for minimind3: .*k_proj"),
        (lambda s: s.update({"model.layers.0.extra.weight": torch.zeros(2)}), r"unknown: .*layers.0.extra.weight"),
        (lambda s: s.update({"surprise": torch.zeros(2)}), "Unknown tensors for minimind3: surprise"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(2)}), r"norm.weight \(2,\) instead of \(48,\)"),
        (lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}), "differs from the embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, message, tmp_path):
    state = torch.load(GOLDEN / "g3v_dense" / "upstream.pth", weights_only=True)
    change(state)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(
            tmp_path / "changed.safetensors",
            tmp_path / "out",
            vision_encoder=GOLDEN / "g3v_dense" / "vision_encoder",
            original_config=read_json("g3v_dense/hparams.json")["constructor_args"],
        )
    assert not (tmp_path / "out").exists()


def test_configuration_that_contradicts_the_tensors(tmp_path):
    args = read_json("g3v_dense/hparams.json")["constructor_args"] | {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match="says num_hidden_layers = 4, but the tensors say 3"):
        convert_checkpoint(
            GOLDEN / "g3v_dense" / "upstream.pth",
            tmp_path / "out",
            vision_encoder=GOLDEN / "g3v_dense" / "vision_encoder",
            original_config=args,
        )


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "holds no argument of the original's constructor"),
        (["hidden_size"], "holds no argument of the original's constructor"),
        ({"architectures": ["MiniMindVLM"], "dtype": "bfloat16"}, "holds no argument of the original's constructor"),
        (
            {"hidden_size": 48, "num_atention_heads": 4},
            "holds num_atention_heads, .* Did you mean num_attention_heads",
        ),
        ({"hidden_size": 48, "colour": "red"}, "holds colour, which is no argument of .* Leave it out"),
    ],
)
def test_unknown_arguments_are_refused(content, message, tmp_path):
    (tmp_path / "original.json").write_text(json.dumps(content))
    for given, name in ((content, "original_config"), (tmp_path / "original.json", "original.json")):
        if isinstance(given, list):
            continue
        with pytest.raises(ValueError, match=rf"{name} {message}"):
            convert_checkpoint(GOLDEN / "g3v_dense" / "upstream.pth", tmp_path / "out", original_config=given)


def test_sizes_that_do_not_fit_the_released_heads_are_said_so(tmp_path):
    with pytest.raises(ValueError, match=r"of hidden_size \d+, do not fit 16 attention heads, as released.*--config"):
        convert_checkpoint(GOLDEN / "g0_dense" / "upstream.pth", tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_all_arguments_of_the_original_are_known(case):
    arguments = read_json(f"{case}/hparams.json")["constructor_args"]
    assert read_arguments(arguments) == arguments
    if (file := GOLDEN / f"{case}_hf" / "config.json").exists():  # in the original's transformers form
        assert read_arguments(file).items() >= {"use_moe": False}.items()


def test_tower_that_is_not_whole_is_refused(tmp_path):
    """Nor is code of its own asked for."""
    tower = shutil.copytree(GOLDEN / "g3v_dense" / "vision_encoder", tmp_path / "tower")
    tensors = load_file(tower / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({key: tensors[key] for key in tensors if key != name}, tower / "model.safetensors", {"format": "pt"})
    arguments = read_json("g3v_dense/hparams.json")["constructor_args"]
    options = {"vision_encoder": tower, "original_config": arguments}
    with pytest.raises(WeightsError, match=r"missing: \S*layers\.1\.mlp\.fc1\.weight\."):
        convert_checkpoint(GOLDEN / "g3v_dense" / "upstream.pth", tmp_path / "out", **options)
    (tower / "config.json").write_text('{"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}')
    with pytest.raises(ValueError, match="must be a CLIP or SigLIP model; it is a 'foreign'"):
        convert_checkpoint(GOLDEN / "g3v_dense" / "upstream.pth", tmp_path / "out", **options)


def test_unknown_release_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"no release 'minimind9'. Choose one of minimind1, minimind2-early, minimind2, minimind3-"
    ):
        convert_checkpoint(GOLDEN / "g2_moe" / "upstream.pth", tmp_path / "out", release="minimind9")


def test_missing_checkpoint_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file, no folder and no Hub repository"):
        convert_checkpoint(tmp_path / "nothing.pth", tmp_path / "out")


def test_existing_output_is_refused_and_kept_when_conversion_fails(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    source = GOLDEN / "g2_moe" / "upstream.pth"
    with pytest.raises(FileExistsError, match=r"exists already.*--overwrite"):
        convert_checkpoint(source, output)
    with pytest.raises(ValueError, match="cannot be told from its tensors"):  # fails after reading: nothing is lost
        args = read_json("g2_moe/hparams.json")["constructor_args"]
        convert_checkpoint(source, output, original_config=args, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_output_that_holds_the_source_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    source = tmp_path / "out" / "sft.pth"
    source.write_bytes((GOLDEN / "g2_moe" / "upstream.pth").read_bytes())
    with pytest.raises(ValueError, match=r"holds .*sft.pth, which is read"):
        convert_checkpoint(source, tmp_path / "out", overwrite=True)
    assert source.exists()


def test_interruption_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*_):
        assert len(list(tmp_path.glob("*/new/model.safetensors"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("minimind_v.conversion.convert.wrap_tokenizer", interrupt)  # after the weights are written
    case = GOLDEN / "g2_moe"
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            case / "upstream.pth",
            tmp_path / "out",
            vision_encoder=case / "vision_encoder",
            tokenizer="x/",
            original_config=read_json("g2_moe/hparams.json")["constructor_args"],
        )
    assert list(tmp_path.iterdir()) == []


# --- Command --------------------------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "original.json").write_text(json.dumps(read_json("g3v_moe/hparams.json")["constructor_args"]))
    case = GOLDEN / "g3v_moe"
    command = ["convert", str(case / "upstream.pth"), "out", "--config", "original.json", "--dtype", "float32"]
    command += ["--vision-encoder", str(case / "vision_encoder")]
    command += ["--tokenizer", str(GOLDEN / "tokenizers" / "minimind3")]
    main(command)
    output, errors = capsys.readouterr()
    assert errors == ""  # progress is for terminals
    for text in ("minimind3: MiniMind-3V", "4 experts, 1 active", "Tower", "Active", "Written to   out"):
        assert text in output
    expected = convert_case("g3v_moe")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="error: out exists already"):
        main(command)
    assert not capsys.readouterr().out


def test_releases_are_those_of_the_recorded_cases():
    assert list(RELEASES) == list(GOLDEN_IDS.values())
    assert {release_of(read_json(f"{case}/hparams.json")) for case in CASES} <= set(RELEASES)
