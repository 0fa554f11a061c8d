"""`generate()` is the library's; every mode, cache and batch must give what a single greedy run gives."""

import pytest
import torch
import transformers
from conftest import IDS, KINDS, make_model, make_text_config, picture, split_images, user
from packaging.version import Version
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, TextIteratorStreamer

from minimind_v import MiniMindForCausalLM

NEW_TOKENS = 12


@pytest.fixture(params=KINDS, ids=IDS)
def setup(request, make_processor, pictures, encode):
    """Model, processor, and three chats: one picture, two pictures with text between, none."""
    tower, moe = request.param
    model, processor = make_model(tower, moe), make_processor(tower)
    chats = [
        user(pictures[0], "What is this?"),
        user("First", pictures[1], " and then ", pictures[2], " What is the difference between the two?"),
        user("Describe nothing."),
    ]
    return model, processor, chats


def answers(model, inputs, **options):
    """New tokens of every row."""
    generated = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW_TOKENS} | options)
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


def test_batch_equals_single_rows(setup, encode):
    model, processor, chats = setup
    single = [answers(model, encode(processor, chat))[0] for chat in chats]
    batch = encode(processor, *chats)
    assert batch["pixel_values"].shape[0] == 3
    assert answers(model, batch) == single
    assert len({tuple(row) for row in single}) == 3


def test_picture_decides_the_answer(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, chats[0])
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert not torch.allclose(model(**inputs).logits[:, -1], model(**other).logits[:, -1], atol=1e-3)


@pytest.mark.parametrize("tower, moe", [("siglip", False), ("clip", True)])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_same_tokens_another_way(tower, moe, options, make_processor, pictures, encode):
    model, processor = make_model(tower, moe), make_processor(tower)
    inputs = encode(processor, user("First", pictures[1], " then ", pictures[2], " What differs?"))
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("the library's offloaded cache needs an accelerator")
    assert answers(model, inputs, **options) == answers(model, inputs)


def test_quantized_cache(make_processor, pictures, encode):
    """Four bits are not exact: the first token, computed while the cache is filled, is; the rest must only run."""
    pytest.importorskip("optimum.quanto", reason="a quantized cache needs optimum-quanto")
    model = make_model(head_dim=64)
    inputs = encode(make_processor(), user(pictures[0], "What is this?"))
    config = {"backend": "quanto", "nbits": 4}
    quantized = answers(model, inputs, cache_implementation="quantized", cache_config=config)[0]
    assert len(quantized) == NEW_TOKENS and quantized[0] == answers(model, inputs)[0][0]


def test_assisted_decoding(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, chats[1])
    assistant = make_model("siglip" if model.config.vision_config.model_type.startswith("s") else "clip")
    assert answers(model, inputs, assistant_model=assistant) == answers(model, inputs)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beams_of_a_batch_equal_single_rows(setup, encode, options):
    model, processor, chats = setup
    # Scores of padded and single rows differ by rounding, which can swap beams that tie: compare in float64.
    model.double().set_experts_implementation("eager")  # the grouped kernel has no float64
    single = [row for chat in chats for row in answers(model, encode(processor, chat), **options)]
    batch = encode(processor, *chats)
    assert answers(model, batch, **options) == single


def test_returned_sequences_have_all_pictures_of_their_row(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, chats[1])
    rows = answers(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert rows == answers(model, inputs) * 3


def test_sampling_follows_the_seed(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, *chats)
    options = {"do_sample": True, "top_p": 0.85, "top_k": 40, "temperature": 0.65, "repetition_penalty": 1.1}
    rows = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rows.append(answers(model, inputs, **options))
    assert rows[0] == rows[1] != rows[2]


def test_streamer_gives_the_same_text(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, chats[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    rows = answers(model, inputs, streamer=streamer)
    assert "".join(streamer) == processor.decode(rows[0])


def test_continuing_from_a_past_cache(setup, encode, pictures):
    """The second turn brings the whole chat and all pictures; the cache holds the first turn."""
    model, processor, chats = setup
    first = encode(processor, chats[1])
    cache = DynamicCache(config=model.config.get_text_config())
    told = model.generate(**first, past_key_values=cache, do_sample=False, max_new_tokens=5)
    answer = processor.decode(told[0, first["input_ids"].shape[1] :])
    turn = [user(pictures[3], "And this?")]
    tail = encode(processor, turn)
    inputs = {
        name: torch.cat([value, tail[name]], 1 if name in ("input_ids", "attention_mask") else 0)
        for name, value in {**first, "input_ids": told}.items()
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert answer and cache.get_seq_length() == told.shape[1] - 1
    assert answers(model, inputs, past_key_values=cache) == answers(model, inputs)


def test_continuing_when_all_pictures_are_in_the_cache(setup, encode):
    model, processor, chats = setup
    first = encode(processor, chats[0])
    cache = DynamicCache(config=model.config.get_text_config())
    told = model.generate(**first, past_key_values=cache, do_sample=False, max_new_tokens=5)
    inputs = {**first, "input_ids": torch.cat([told, told[:, -4:]], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert answers(model, inputs, past_key_values=cache) == answers(model, inputs)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.21"), reason="older versions refuse pictures here")
def test_chunked_prefill(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, chats[1])
    assert answers(model, inputs, prefill_chunk_size=7) == answers(model, inputs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_features_computed_once_serve_many_questions(setup, encode, options):
    model, processor, chats = setup
    inputs = encode(processor, chats[1])
    expected = answers(model, inputs, **options)
    inputs, images = split_images(inputs)
    features = model.get_image_features(**images)
    assert [tuple(image.shape) for image in features.pooler_output] == [(16, 32)] * 2
    tower_calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: tower_calls.append(1))
    for _ in range(2):  # the second time: the first call has not changed the features
        assert answers(model, {**inputs, "mm_encoder_outputs": {"image": features}}, **options) == expected
    assert not tower_calls


def test_embeddings_instead_of_ids(setup, encode):
    model, processor, chats = setup
    inputs = encode(processor, chats[1])
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    for options in ({}, {"num_beams": 3}):
        options |= {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        assert model.generate(**given, **options).tolist() == answers(model, inputs, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_pictures_without_their_places_are_refused(options, make_processor, encode):
    model = make_model()
    inputs = encode(make_processor(), user(picture(0), "one"), user(picture(1), "two"))
    pixels = inputs.pop("pixel_values")
    for wrong in (pixels[:1], torch.cat([pixels, pixels[:1]])):
        with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: "):
            answers(model, {**inputs, "pixel_values": wrong}, **options)
    text = encode(make_processor(), user("no picture"))
    with pytest.raises(ValueError, match="do not match, tokens: 0, features: 16"):
        answers(model, {**text, "pixel_values": pixels[:1]}, **options)


def test_tower_runs_once_per_generation(setup, encode):
    model, processor, chats = setup
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answers(model, encode(processor, *chats))
    assert len(calls) == 1
    answers(model, encode(processor, chats[2]))
    assert len(calls) == 1  # text only: the tower is not used


def test_compiled_decoding_with_a_static_cache(make_processor, pictures, encode):
    model = make_model("siglip", moe=True)
    inputs = encode(make_processor(), user(pictures[0], "What is this?"))
    expected = answers(model, inputs)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    assert answers(model, inputs, cache_implementation="static") == expected


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("is_text", [True, False], ids=["text", "images"])
def test_continuous_batching_of_text(is_text, moe):
    """Prompts of different lengths, each answered as alone."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(make_text_config(moe)).eval() if is_text else make_model("siglip", moe)
    prompts = [[1, 20, 30, 40], [1, 50, 60, 70, 80, 90, 100], [1, 7]]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": 2, "pad_token_id": 0}
    config = GenerationConfig(**options)
    single = [
        model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    small = ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=64)  # left out, most of the memory
    batch = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    assert [result.generated_tokens for result in batch.values()] == single


@pytest.mark.parametrize("tower, moe", KINDS, ids=IDS)
def test_continuous_batching_refuses_images(tower, moe, make_processor, encode):
    model = make_model(tower, moe)
    inputs = encode(make_processor(tower), user(picture(), "What is this?"))
    prompts = inputs["input_ids"].tolist()
    features = model.get_image_features(
        **{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    )
    for arguments in (
        {"inputs": prompts},
        {"inputs": [[1, 20], *prompts]},
        {"inputs": [[1, 20]], "pixel_values": inputs["pixel_values"]},
        {"inputs": [[1, 20]], "mm_encoder_outputs": {"image": features}},
    ):
        with pytest.raises(ValueError, match=r"generate_batch takes text only.*generate\(\)"):
            model.generate_batch(**arguments)
