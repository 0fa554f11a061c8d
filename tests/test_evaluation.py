"""`minimind-v evaluate`: the embedded model on real pictures, against captions, Trainer and sacrebleu themselves."""

import json
import math
import re
import shutil
import sys

import pytest
from conftest import CHECKPOINT, REPOSITORY, caption_row, make_text_config, write_jsonl
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_command_line import COMMAND, run, run_process
from test_readme import CAPTIONS, PICTURES

sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra: evaluate)")

from minimind_v import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVProcessor  # noqa: E402
from minimind_v.inference.captioning import caption_images  # noqa: E402
from minimind_v.publishing.card import card_data, read_own_card  # noqa: E402
from minimind_v.training import MiniMindVDataCollator, MiniMindVDataset  # noqa: E402
from minimind_v.training.arguments import TrainArguments  # noqa: E402
from minimind_v.training.data import images_of  # noqa: E402
from minimind_v.training.evaluation import evaluate  # noqa: E402
from minimind_v.training.scores import compute_figures, read_choice, score_answer, share  # noqa: E402
from minimind_v.training.shuffled_images import ShuffledImages  # noqa: E402
from minimind_v.training.trainer import MiniMindVTrainer  # noqa: E402

ATTACK = "<script>alert(1)</script>"
OPTIONS = ["--batch-size", "3", "--by", "asked"]
FILES = ["answers.jsonl", "model_index.yaml", "report.html", "results.json", "run.json"]


def read_answers(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every picture in two languages with the truth that the model knows; three truths that it does not."""
    rows = [
        caption_row(str(path), question, CAPTIONS[path.name][language])
        | {"asked": ["in English", "in Chinese"][language]}
        for language, question in enumerate(("Describe this image.", "这是什么？"))
        for path in PICTURES
    ]
    apple = str(PICTURES[0])
    rows += [caption_row(apple, "Is this an apple?", "Yes."), caption_row(apple, "A. dog B. apple", "B")]
    rows.append(caption_row(apple, f"Describe {ATTACK}", f"An apple {ATTACK}"))
    return write_jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", rows)


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    """Folder and results of an evaluation that was not interrupted, by the command."""
    folder = tmp_path_factory.mktemp("evaluation") / "output"
    result = run_process(COMMAND, "evaluate", CHECKPOINT, data, "--output", folder, *OPTIONS)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))


# --- Figures ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_caption(evaluated, tmp_path):
    folder, results = evaluated
    assert sorted(path.name for path in folder.iterdir()) == FILES
    captions = {}
    for prompt in ("Describe this image.", "这是什么？"):
        output = tmp_path / f"{len(captions)}.jsonl"
        caption_images([str(path) for path in PICTURES], prompt, output, options={"greedy": True})
        for line in map(json.loads, output.read_text(encoding="utf-8").splitlines()):
            captions[prompt, line["image"]] = line["caption"]
    records = read_answers(folder)
    count = 2 * len(PICTURES)
    assert [record["row"] for record in records] == list(range(count + 3))
    questions = [(record["question"], str(PICTURES[i % len(PICTURES)])) for i, record in enumerate(records[:count])]
    assert [record["answer"] for record in records[:count]] == [captions[question] for question in questions]
    assert all(record["exact_match"] for record in records[:count])
    assert not any(record["exact_match"] for record in records[count:])
    assert results["all"]["exact_match"]["value"] == count / (count + 3)
    groups = results["by"]
    assert groups["language"].keys() == {"zh", "other"} and groups["asked"].keys() == {
        "in English",
        "in Chinese",
        "none",
    }
    assert groups["language"]["zh"] == groups["asked"]["in Chinese"]
    assert groups["asked"]["in Chinese"]["exact_match"]["value"] == 1 and groups["asked"]["none"]["rows"] == 3
    assert results["all"]["accuracy"]["rows"] == 2 and "accuracy" not in groups["language"]["zh"]


def test_loss_is_that_of_trainer(evaluated, data, tmp_path):
    folder, results = evaluated
    model = MiniMindVForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32")
    processor, dataset = MiniMindVProcessor.from_pretrained(CHECKPOINT), MiniMindVDataset(data)
    losses = {}
    for batch_size in (1, len(dataset)):
        arguments = TrainArguments(
            model=str(CHECKPOINT),
            data=str(data),
            output_dir=str(tmp_path),
            per_device_eval_batch_size=batch_size,
            report_to="none",
            use_cpu=True,
        )
        collator = MiniMindVDataCollator(processor)
        trainer = MiniMindVTrainer(
            model, arguments, data_collator=collator, eval_dataset=dataset, processing_class=processor
        )
        losses[batch_size] = trainer.evaluate()["eval_loss"]
    assert results["all"]["loss"]["value"] == pytest.approx(losses[len(dataset)], abs=1e-5)
    # Trainer takes the mean over batches; of rows alone, that is the mean of their losses
    rows = [record["loss"] for record in read_answers(folder)]
    assert sum(rows) / len(rows) == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[1] - losses[len(dataset)]) > 1e-3
    assert results["all"]["perplexity"]["value"] == pytest.approx(math.exp(losses[len(dataset)]), rel=1e-4)


def test_scores_are_those_of_sacrebleu(evaluated):
    folder, results = evaluated
    records = read_answers(folder)
    chinese, other = (
        [record for record in records if bool(re.search("[一-龥]", record["truth"])) is is_chinese]
        for is_chinese in (True, False)
    )
    groups = [(results["all"], records, "zh")]
    groups += [(results["by"]["language"]["zh"], chinese, "zh"), (results["by"]["language"]["other"], other, "13a")]
    for figures, chosen, tokenizer in groups:
        answers, truths = ([record[key] for record in chosen] for key in ("answer", "truth"))
        assert figures["rows"] == len(chosen) > 10
        assert figures["bleu"]["value"] == sacrebleu.corpus_bleu(answers, [truths], tokenize=tokenizer).score
        assert f"tok:{tokenizer}|" in figures["bleu"]["signature"]
        assert figures["chrf"]["value"] == sacrebleu.corpus_chrf(answers, [truths]).score
    assert [record["chrf"] for record in records] == [
        sacrebleu.sentence_chrf(record["answer"], [record["truth"]]).score for record in records
    ]
    figures = results["all"]
    for name in ("loss", "perplexity", "exact_match", "chrf", "bleu", "accuracy"):
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
    assert 0 < figures["chrf"]["low"] < figures["chrf"]["value"] < 100 and 0 < figures["bleu"]["low"] < 100


def test_intervals():
    # Wilson's for 0 and 10 of 10 and 4 of 20, as Newcombe (1998) and tables have them
    assert share([False] * 10) == pytest.approx({"value": 0, "low": 0, "high": 0.2775}, abs=1e-4)
    assert share([True] * 10) == pytest.approx({"value": 1, "low": 0.7225, "high": 1}, abs=1e-4)
    assert share([True] * 4 + [False] * 16) == pytest.approx({"value": 0.2, "low": 0.0807, "high": 0.4160}, abs=1e-4)
    # The bootstrap's of a mean of n losses comes near the normal one, 1.96 s / sqrt(n), here with s = 1
    records = [
        {"answer": "a", "truth": "b", "loss": i % 2 * 2, "tokens": 3} | score_answer("a", "b") for i in range(400)
    ]
    loss = compute_figures(records, seed=1)["loss"]
    assert loss["value"] == 1 and loss["low"] == pytest.approx(1 - 0.098, abs=0.01)
    assert loss["high"] == pytest.approx(1 + 0.098, abs=0.01)
    assert compute_figures(records, seed=1)["loss"] == loss != compute_figures(records, seed=2)["loss"]


@pytest.mark.parametrize(
    "text, as_answer, as_truth",
    [
        ("B", "B", "B"),
        ("(B) a dog", "B", "B"),
        ("C. 一只狗", "C", "C"),
        ("A red apple.", None, None),
        ("C'est la vie", None, None),
        ("D-day", None, None),
        ("Yes, it is.", "yes", "yes"),
        ("no it is not", "no", None),
        ("No one is here.", "no", None),
        ("Nobody", None, None),
        ("是的。", "yes", "yes"),
        ("不是，是狗", "no", "no"),
        ("否", "no", "no"),
        ("是一只猫", None, None),
        ("", None, None),
    ],
)
def test_reading_choices(text, as_answer, as_truth):
    assert read_choice(text) == as_answer and read_choice(text, is_truth=True) == as_truth


# --- Going on, and several processes ---------------------------------------------------------------------------------


INTERRUPTED = """  # the command, with Ctrl-C in the third batch
import os, signal, sys
from minimind_v.training import evaluation
from minimind_v_cli.__main__ import main

def answer_batch(*arguments, answer=evaluation.answer_batch, begun=[]):
    begun.append(arguments)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return answer(*arguments)

evaluation.answer_batch = answer_batch
sys.exit(main())
"""


def test_interrupted_goes_on_to_the_same_bytes(evaluated, data, tmp_path):
    folder, _ = evaluated
    command = [*COMMAND, "evaluate", str(CHECKPOINT), str(data), "--output", str(tmp_path / "output"), *OPTIONS]
    answers = tmp_path / "output" / "answers.jsonl"
    process = run_process([sys.executable, "-c", INTERRUPTED, *command[len(COMMAND) :]])
    assert process.returncode == 130 and "Interrupted. The same command goes on with what is in" in process.stderr
    begun = answers.read_bytes()
    assert begun.count(b"\n") == 6 and not (tmp_path / "output" / "results.json").exists()
    # As if killed while it wrote: a batch in part, and a character too
    answers.write_bytes(begun[: begun.rfind(b"\n", 0, -1) - 1])
    result = run_process(command)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in FILES:
        assert (tmp_path / "output" / name).read_bytes() == (folder / name).read_bytes(), name


def test_two_processes_give_the_figures_of_one(evaluated, data, tmp_path):
    config = REPOSITORY / "examples" / "accelerate" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "minimind_v_cli", "evaluate", CHECKPOINT]
    result = run_process(command, data, "--output", tmp_path / "two", "--device", "cpu", *OPTIONS)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("exact match") == 6
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES
    assert (tmp_path / "two" / "results.json").read_bytes() == (evaluated[0] / "results.json").read_bytes()


def test_output_of_another_evaluation_is_left_as_it_is(evaluated, data, tmp_path):
    folder = shutil.copytree(evaluated[0], tmp_path / "output")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other_model = shutil.copytree(CHECKPOINT, tmp_path / "model" / CHECKPOINT.name)
    model = MiniMindVForConditionalGeneration.from_pretrained(other_model)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(other_model)
    lines = data.read_text(encoding="utf-8").replace("Yes.", "No.")
    other_data = tmp_path / data.name
    other_data.write_text(lines, encoding="utf-8")
    advice = r" instead of .*\. Choose another --output\."
    for name, arguments, options in (
        ("weights", (other_model, data), {}),
        ("contents", (CHECKPOINT, other_data), {}),
        ("rows", (CHECKPOINT, data), {"limit": 3}),
        ("shuffled_images", (CHECKPOINT, data), {"shuffle_images": True}),
        ("answers", (CHECKPOINT, data), {"options": {"max_new_tokens": 3}}),
    ):
        with pytest.raises(ValueError, match=rf"output holds another evaluation, with {name} .*{advice}"):
            evaluate(*arguments, folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "plan.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"notes holds something else than an evaluation\. Choose another"):
        evaluate(CHECKPOINT, data, tmp_path / "notes", limit=1)


# --- Shuffled images -------------------------------------------------------------------------------------------------


def test_shuffled_images_change_answers(evaluated, data, tmp_path):
    folder, true = evaluated
    results = evaluate(CHECKPOINT, data, tmp_path / "output", batch_size=16, by=["asked"], shuffle_images=True)
    assert not (tmp_path / "output" / "model_index.yaml").exists()
    assert "another row's picture" in (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    assert "another row's picture" not in (folder / "report.html").read_text(encoding="utf-8")
    assert results["shuffled_images"] and not true["shuffled_images"]
    # All are about another picture, and every picture has another name
    assert results["all"]["exact_match"]["value"] == 0 and true["all"]["exact_match"]["value"] > 0.9
    known, others = (found["by"]["asked"]["in Chinese"]["loss"] for found in (true, results))
    assert others["low"] > 1 > 0.05 > known["high"]
    truths = {caption for captions in CAPTIONS.values() for caption in captions}
    assert {record["answer"] for record in read_answers(tmp_path / "output")} & truths


@pytest.mark.parametrize(
    "keys", [["a", "b"], ["a", "b", "c", "d", "e"], ["ab", "c", "", "de", "f"], ["a", "a", "a", "b", "c", "d", "d"]]
)
def test_no_row_keeps_its_image(keys):
    class Rows:
        def __getitem__(self, index):
            return {
                "messages": [{"role": "user", "content": [{"type": "image", "image": key} for key in keys[index]]}]
            }

    for seed in range(20):
        rows = ShuffledImages(Rows(), keys, seed)
        shuffled = [images_of(rows[i]["messages"]) for i in range(len(keys))]
        assert sorted("".join(map("".join, shuffled))) == sorted("".join(keys))
        assert [len(images) for images in shuffled] == list(map(len, keys))
        assert all(not set(images) & set(own) for images, own in zip(shuffled, keys, strict=True))


def test_nothing_to_shuffle():
    for keys in ([["a"], ["a"]], [[], []]):
        with pytest.raises(ValueError, match="There are no two different pictures to exchange"):
            ShuffledImages([], keys)


# --- What it writes --------------------------------------------------------------------------------------------------


def test_report_shows_the_worst_first_and_escapes(evaluated):
    page = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert "<script" not in text and "http" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2  # a question and a truth
    records = read_answers(evaluated[0])
    assert page.count("<section>") == page.count("data:image/png;base64,") == len(records)
    colours = re.findall(r'<span class="(right|wrong)">', page)
    right = sum(bool(record["exact_match"] or record["correct"]) for record in records)
    assert colours == ["wrong"] * (len(records) - right) + ["right"] * right and 0 < right < len(records)


def test_card(evaluated, data, tmp_path, capsys):
    """Figures go into the metadata of the model's card, and from there into the published one."""
    model = shutil.copytree(CHECKPOINT, tmp_path / CHECKPOINT.name)
    before = ModelCard.load(model / "README.md")
    assert before.data.eval_results
    output = shutil.copytree(evaluated[0], tmp_path / "output")
    for _ in range(2):  # the second time in the place of the first
        assert run("evaluate", model, data, "--output", output, "--by", "asked", "--card") == 0
    card, metadata = ModelCard.load(model / "README.md"), (output / "model_index.yaml").read_text(encoding="utf-8")
    assert card.text == before.text and card.data.model_name == before.data.model_name
    assert card.data.eval_results[: len(before.data.eval_results)] == before.data.eval_results
    added = card.data.eval_results[len(before.data.eval_results) :]
    values = {(entry.dataset_config, entry.metric_type): entry.metric_value for entry in added}
    figures = evaluated[1]["all"]
    names = ("loss", "perplexity", "exact_match", "accuracy", "chrf", "bleu")
    for name in names:
        assert values[None, name] == round(figures[name]["value"], 4)
    assert values["asked in Chinese", "exact_match"] == 1 and len(values) == len(added)
    own = ModelCard(f"---\n{metadata}---\n").data
    assert sorted(map(str, own.eval_results)) == sorted(map(str, added)) and own.model_name == CHECKPOINT.name
    published = card_data(read_own_card(model / "README.md")[0], "emoji", None, [], "Red apple.")
    assert isinstance(published, ModelCardData)
    found = model_index_to_eval_results(published.to_dict()["model-index"])[1]
    assert sorted(map(str, found)) == sorted(map(str, card.data.eval_results))

    (model / "README.md").unlink()
    assert run("evaluate", model, data, "--output", output, "--card") == 0
    assert len(ModelCard.load(model / "README.md").data.eval_results) == 2 * 6 + 5
    printed = capsys.readouterr().out
    assert f"all, {figures['rows']} rows\n  loss         {figures['loss']['value']:.4g} [" in printed


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, options, message",
    [
        ([], {}, "is empty. It needs one row"),
        (
            [caption_row(str(PICTURES[0])), {"messages": [{"role": "user", "content": "Hi"}]}],
            {},
            "row 1: there is no assi",
        ),
        ([caption_row("none.png")], {}, "1 of 1 rows cannot be evaluated:\n  row 0: "),
        ([caption_row(str(PICTURES[0]), answer="long " * 900)], {}, "tokens are more than"),
        ([caption_row(str(PICTURES[0]))], {"by": ["kind"]}, "No row has the column kind. There are images, messages."),
    ],
)
def test_data_that_cannot_be_used(content, options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(CHECKPOINT, write_jsonl(tmp_path / "rows.jsonl", content), tmp_path / "output", **options)
    assert not (tmp_path / "output").exists()


def test_other_mistakes(data, tmp_path, monkeypatch):
    text = tmp_path / "text"
    MiniMindForCausalLM(make_text_config()).save_pretrained(text)
    assert "text is a minimind model, not a vision-language one" in run("evaluate", text, data)
    assert "--card needs" in run("evaluate", CHECKPOINT, data, "--card", "--shuffle-images")
    with pytest.raises(ValueError, match="The data has no rows"):
        evaluate(CHECKPOINT, [], tmp_path / "output")
    monkeypatch.delitem(sys.modules, "minimind_v.training.evaluation")
    monkeypatch.delitem(sys.modules, "minimind_v.training.evaluation_report")
    monkeypatch.delitem(sys.modules, "minimind_v.training.scores")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    error = run("evaluate", CHECKPOINT, data)
    assert error.startswith("error: Scores need the library sacrebleu: pip install 'minimind-v[evaluate]'")
