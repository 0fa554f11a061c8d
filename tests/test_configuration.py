"""Configurations: defaults, round trips, and values that are refused."""

import json

import pytest
from conftest import IDS, KINDS, make_config, make_text_config
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig

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
        ({"router_aux_loss_type": "none"}, "router_aux_loss_type .* got 'none'"),
    ],
)
def test_impossible_decoders_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MiniMindConfig(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_seq_length": 63}, "image_seq_length must be 64.*8 x 8 patches.* got 63"),
        ({"projector_type": "resampler"}, "projector_type must be one of .*'linear', 'mlp'.* got 'resampler'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy .* got 'cls'"),
        ({"vision_feature_select_strategy": "default"}, "one of .*'full'.* got 'default'"),
        ({"text_config": {}}, "image_token_id .* got None"),
        ({"image_token_id": 6400}, "image_token_id .*6399.* got 6400"),
    ],
)
def test_impossible_compositions_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MiniMindVConfig(**values)
