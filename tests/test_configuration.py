"""Configurations: defaults, round trips, and values that are refused."""

import copy
import json

import pytest
from conftest import IDS, KINDS, make_config, make_text_config
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPVisionConfig,
    SiglipVisionConfig,
)

from minimind_v import MiniMindConfig, MiniMindVConfig


def test_defaults_are_the_released_minimind_3v():
    config = MiniMindVConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.head_dim) == (768, 8, 2432, 96)
    assert (text.vocab_size, text.num_key_value_heads, text.rope_parameters["rope_theta"]) == (6400, 4, 1e6)
    assert (vision.model_type, vision.image_size, vision.patch_size) == ("siglip_vision_model", 256, 32)
    assert (config.image_seq_length, config.image_token_id, config.projector_type) == (64, 12, "mlp")
    assert config.vision_feature_select_strategy == "full" and config.tie_word_embeddings


def test_left_out_values_follow_from_the_tower():
    clip = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16}
    config = MiniMindVConfig(text_config={}, vision_config=clip, image_token_id=34)
    assert (config.image_seq_length, config.vision_feature_select_strategy) == (196, "default")
    full = MiniMindVConfig(vision_config=clip, image_token_id=34, vision_feature_select_strategy="full")
    assert full.image_seq_length == 197


@pytest.mark.parametrize("tower, moe", KINDS, ids=IDS)
def test_round_trip_through_json(tower, moe, tmp_path):
    config = make_config(tower, moe)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == MiniMindVConfig.from_dict(json.loads(config.to_json_string())).to_json_string()
    assert (
        type(loaded.text_config) is MiniMindConfig and loaded.text_config.num_experts == config.text_config.num_experts
    )
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_nested_configurations_may_be_objects_or_dicts():
    objects = make_config("clip")
    dicts = MiniMindVConfig(
        text_config=objects.text_config.to_dict(),
        vision_config=objects.vision_config.to_dict(),
        image_token_id=3,
        projector_type="linear",
    )
    assert dicts.to_dict() == objects.to_dict()
    text, vision = make_text_config(), CLIPVisionConfig(image_size=32, patch_size=8)
    config = MiniMindVConfig(text_config=text, vision_config=vision, image_token_id=3)
    assert config.text_config is text and config.vision_config is vision
    assert config.get_text_config() is text


def test_one_tie_flag_rules_both():
    config = MiniMindVConfig(text_config={"tie_word_embeddings": True}, image_token_id=3, tie_word_embeddings=False)
    assert not config.text_config.tie_word_embeddings


def test_whole_clip_gives_its_vision_half():
    config = MiniMindVConfig(vision_config=CLIPConfig(), image_token_id=3)
    assert config.vision_config.model_type == "clip_vision_model" and config.image_seq_length == 49


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads .6. .* num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"use_moe": True, "num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok .* got 3"),
        ({"router_aux_loss_type": "none"}, "router_aux_loss_type(.|\n)*none"),
    ],
)
def test_impossible_decoders_are_refused(values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MiniMindConfig(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_seq_length": 63}, "image_seq_length must be 64, as the tower makes; got 63"),
        ({"projector_type": "resampler"}, "projector_type(.|\n)*'linear', 'mlp'(.|\n)*resampler"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy(.|\n)*cls"),
        ({"vision_feature_select_strategy": "default"}, "must be 'full': the tower has no CLS token"),
        ({"image_token_id": 6400}, r"image_token_id .*vocab_size \(6400\); got 6400"),
        (
            {"projector_merge_size": 3},
            r"3 positions \(sequence\) cannot be one token; the tower has 64",
        ),
        ({"projector_merge_size": 0}, "projector_merge_size: 0 positions"),
        ({"projector_merge_size": 2, "projector_merge_order": "block"}, "2 positions .block. cannot be one token"),
        (
            {"projector_merge_order": "block", "vision_config": {"model_type": "siglip2_vision_model"}},
            "1 positions .block. cannot be one token",
        ),
        (
            {"projector_merge_size": 4, "vision_feature_select_strategy": "full", "vision_config": CLIPConfig()},
            "the tower has 50 positions",
        ),
        ({"vision_config": {"image_size": [64, 32]}}, r"square images only; got image_size \[64, 32\]"),
    ],
)
def test_impossible_compositions_are_refused(values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MiniMindVConfig(**values)


def test_what_is_passed_in_stays_as_it_is():
    rope = {"rope_type": "default"}
    text = {"tie_word_embeddings": True, "rope_parameters": rope, "hidden_size": 64}
    vision = {"model_type": "siglip_vision_model", "image_size": [32, 32], "patch_size": 8}
    given = copy.deepcopy((text, vision))
    MiniMindVConfig(text_config=text, vision_config=vision, image_token_id=3, tie_word_embeddings=False)
    MiniMindConfig(rope_parameters=rope)
    assert (text, vision) == given
    text, vision = make_text_config(), SiglipVisionConfig(image_size=[32, 32], patch_size=8)
    config = MiniMindVConfig(text_config=text, vision_config=vision, image_token_id=3, tie_word_embeddings=False)
    assert text.tie_word_embeddings and not config.text_config.tie_word_embeddings
    assert vision.image_size == [32, 32] and config.vision_config.image_size == 32 and config.image_seq_length == 16


def test_a_dense_decoder_says_nothing_of_experts(tmp_path):
    """vLLM takes any count of experts in a configuration for a mixture of experts."""
    every_layer = {"use_moe": True, "num_experts": 8, "mlp_only_layers": [0, 1], "num_hidden_layers": 2}
    saved_before = {"num_local_experts": 4, "num_experts_per_tok": 1}  # earlier versions saved dense decoders so
    for values in ({}, {"num_experts": 8}, every_layer, saved_before):
        config = MiniMindConfig(**values)
        assert not config.use_moe and config.num_experts == 0 and config.router_aux_loss_coef == 0
        words = ("expert", "router", "moe_", "topk", "sparse", "mlp_only")
        assert not [name for name in config.to_dict() if any(word in name for word in words)]
        assert not [name for name in config.base_model_tp_plan if "expert" in name]
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_diff_dict().keys() == config.to_diff_dict().keys()
        assert AutoConfig.from_pretrained(tmp_path).num_experts == 0
    mixed = MiniMindConfig(use_moe=True, mlp_only_layers=[0])
    assert mixed.use_moe and mixed.num_experts == 4 and mixed.to_dict()["num_local_experts"] == 4


@pytest.mark.parametrize("tower, moe", KINDS, ids=IDS)
def test_saved_files_have_no_labels_of_classifiers(tower, moe, tmp_path):
    make_config(tower, moe).save_pretrained(tmp_path)
    assert "label2id" not in (tmp_path / "config.json").read_text()
    make_text_config(moe).save_pretrained(tmp_path)
    assert "label2id" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("auto", [AutoConfig, AutoModelForImageTextToText])
def test_old_conversions_say_what_to_do(auto, tmp_path):
    """MiniMind2 converted by an earlier version: an image was a run of the character `@`."""
    make_config("clip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["original_generation"] = "minimind2-early"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"^This checkpoint was converted by an earlier .* Convert .* again .minimind-v convert.\.$"
    ):
        auto.from_pretrained(tmp_path)
