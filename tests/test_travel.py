"""Checkpoints that travel: loaded in a fresh process, offline, with an empty module cache, without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import CODE, make_model, make_text_config, picture, user
from packaging.version import Version
from transformers import Trainer, TrainingArguments, pipeline

from minimind_v import MiniMindForCausalLM

# Runs in the fresh process: argv = checkpoint, picture, whether to trust its code. Prints one JSON line.
PROGRAM = """
import json, sys, warnings
checkpoint, picture, mode = sys.argv[1:]
warnings.simplefilter("error")
if mode == "remote":
    sys.modules["minimind_v"] = None  # as if not installed
    trust = {"trust_remote_code": True}
else:
    import minimind_v
    trust = {}
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForMultimodalLM, AutoProcessor, pipeline)
config = AutoConfig.from_pretrained(checkpoint, **trust)
processor = AutoProcessor.from_pretrained(checkpoint, **trust)
content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe this image."}]
chat = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
classes, answers = [type(config).__name__, type(processor).__name__], []
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(checkpoint, **trust).eval()
    ids = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    classes.append(type(model).__name__)
    answers.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
base = AutoModel.from_pretrained(checkpoint, **trust)
classes.append(type(base).__name__)
captioner = pipeline("image-to-text", model=checkpoint, **trust)
answers.append(captioner(picture)[0]["generated_text"])
chatter = pipeline("image-text-to-text", model=checkpoint, **trust)
print("image-text-to-text", file=sys.stderr)
answers.append(chatter(text=chat, return_full_text=False)[0]["generated_text"].strip())
model.save_pretrained(checkpoint + "-again")
processor.save_pretrained(checkpoint + "-again")
captioner.save_pretrained(checkpoint + "-pipeline")
print(json.dumps({"classes": classes, "answers": answers, "modules": type(model).__module__}))
"""
COMPLETE = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    *CODE,
}


def run_elsewhere(program, *arguments, folder):
    """A Python process that knows nothing of this one; returns its JSON and checks that it printed nothing else."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST", "PYTHON"))}
    environment |= {
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    bars = ("Loading weights", "Writing model shards", "image-text-to-text")
    before, _, after = result.stderr.replace("\r", "\n").partition("image-text-to-text\n")
    if Version(transformers.__version__) < Version("5.20"):  # that pipeline of the library warns so, for any model
        bars_after = (
            *bars,
            "[transformers] Passing `generation_config` together",
            "[transformers] Both `max_new_tokens`",
        )
    else:
        bars_after = bars
    assert [line for line in before.split("\n") if line and not line.startswith(bars)] == []
    assert [line for line in after.split("\n") if line and not line.startswith(bars_after)] == []
    return json.loads(result.stdout)


def check_checkpoint(checkpoint, expected, tmp_path, mode):
    image = tmp_path / "picture.png"
    picture(1).save(image)
    result = run_elsewhere(PROGRAM, checkpoint, image, mode, folder=tmp_path)
    name = "MiniMindVForConditionalGeneration"
    assert result["classes"] == ["MiniMindVConfig", "MiniMindVProcessor", name, name, name, "MiniMindVModel"]
    assert set(result["answers"]) == {expected} and len(result["answers"]) == 5
    assert result["modules"].startswith("transformers_modules." if mode == "remote" else "minimind_v.")
    for other in (f"{checkpoint}-again", f"{checkpoint}-pipeline"):
        for file in COMPLETE:
            first, second = (os.path.join(folder, file) for folder in (checkpoint, other))
            with open(first, "rb") as a, open(second, "rb") as b:
                assert a.read() == b.read(), f"{file} differs in {other}"


def caption(model, processor):
    pipe = pipeline("image-to-text", model=model, processor=processor, trust_remote_code=True)
    return pipe(picture(1))[0]["generated_text"]


@pytest.fixture
def parts(make_processor):
    model, processor = make_model("siglip"), make_processor()
    inputs = processor.apply_chat_template(
        [user(picture(1), "Describe this image.")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return model, processor, processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("mode", ["remote", "local"])
def test_saved_model_and_processor(parts, tmp_path, mode):
    model, processor, expected = parts
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == COMPLETE
    check_checkpoint(checkpoint, expected, tmp_path, mode)


def test_pipeline_of_the_library_saves_enough(parts, tmp_path):
    """`image-text-to-text` does not save the processor; its tokenizer and image processor are enough."""
    model, processor, expected = parts
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    checkpoint = tmp_path / "checkpoint"
    pipeline("image-text-to-text", model=str(tmp_path / "source")).save_pretrained(checkpoint)
    program = PROGRAM[: PROGRAM.index("model.save_pretrained")] + 'print(json.dumps({"answers": answers}))'
    picture(1).save(tmp_path / "picture.png")
    result = run_elsewhere(program, checkpoint, tmp_path / "picture.png", "remote", folder=tmp_path)
    assert set(result["answers"]) == {expected}


def test_what_trainer_saves(parts, tmp_path):
    model, processor, _ = parts
    inputs = processor(text="<|image_pad|>A cat.", images=picture(1), return_tensors="pt")
    row = {key: value[0] for key, value in inputs.items()} | {"labels": inputs["input_ids"][0]}
    arguments = TrainingArguments(
        output_dir=tmp_path / "run", max_steps=2, save_steps=2, report_to="none", remove_unused_columns=False,
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[row] * 4, processing_class=processor)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    model.eval()
    ids = processor.apply_chat_template(
        [user(picture(1), "Describe this image.")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        answer = model.generate(**ids, do_sample=False)[:, ids["input_ids"].shape[1] :]
    expected = processor.batch_decode(answer, skip_special_tokens=True)[0].strip()
    for checkpoint in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        assert {path.name for path in checkpoint.iterdir()} >= COMPLETE
    check_checkpoint(tmp_path / "run" / "checkpoint-2", expected, tmp_path, "remote")


def test_text_only_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(make_text_config(moe=True)).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    program = """
import json, sys, torch
sys.modules["minimind_v"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
trust = {"trust_remote_code": True}
AutoConfig.from_pretrained(sys.argv[1], **trust), AutoModel.from_pretrained(sys.argv[1], **trust)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust).eval()
print(json.dumps(model.generate(torch.arange(4, 12)[None], do_sample=False, max_new_tokens=8).tolist()))
"""
    expected = model.generate(torch.arange(4, 12)[None], do_sample=False, max_new_tokens=8).tolist()
    assert run_elsewhere(program, tmp_path / "checkpoint", folder=tmp_path) == expected
