"""Evaluation on held-out data: the loss of the true answers, and how the model's own answers compare with them.

Every row is asked its last question; the loss is that of training, over all answers of the row. Answers are written
as they come, and the same call goes on with them after an interruption. With shuffled images, every question is asked
about another row's image: a model that looks does worse then.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import ModelCardData
from torch.nn import functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from ..common import locked, read_json
from ..inference.engine import Engine, encode
from ..inference.records import describe_options
from .check import describe
from .collator import IGNORE_INDEX, MiniMindVDataCollator
from .data import MiniMindVDataset, images_of, split_last_answer, text_of
from .evaluation_report import METRICS, describe_figure, list_figures, list_results, render_report, update_card
from .image_features import content_key, update_digest
from .scores import Record, compute_figures, language_of, score_answer
from .shuffled_images import ShuffledImages


def evaluate(
    model: str | Path,
    data: Any,
    output: str | Path = "minimind-v-evaluation",
    *,
    by: Sequence[str] = (),
    batch_size: int = 8,
    limit: int | None = None,
    shuffle_images: bool = False,
    card: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Asks a model the questions of held-out data and writes figures, answers and a page to look at into a folder.

    Under `accelerate launch`, every process answers its share.

    Args:
        model: As for [`Engine`].
        data: As for training, see [`data.read_rows`].
        output: Folder of this evaluation alone: `results.json`, `answers.jsonl`, `report.html`, `model_index.yaml`
            (not of shuffled images), and `run.json`, by which an interrupted evaluation is known again.
        by: Columns of the data whose values get figures of their own; languages get theirs in any case.
        batch_size: Rows at a time.
        limit: Only so many rows, the first ones.
        shuffle_images: Ask about other rows' images, see [`ShuffledImages`].
        card: Put the figures into the metadata of the model's README.md.
        options: Of [`Engine`]; greedy if they do not say otherwise. `seed` is also that of bootstrap and shuffling.

    Returns:
        What `results.json` holds: what was evaluated and how, `all` ([`compute_figures`]) and `by`: column -> value ->
        the same.

    Raises:
        ValueError: A row cannot be used, there is none, no row has a column of `by`, or `output` holds another
            evaluation; and what [`Engine`] raises.
        FileExistsError: `output` holds something else.
        BlockingIOError: Another process writes it.
    """
    options, output = {"greedy": True} | (options or {}), Path(output)
    if card and (shuffle_images or not Path(model).is_dir()):
        raise ValueError("--card needs a model in a folder, for its README.md, and pictures that are not shuffled.")
    engine, seed, is_main = Engine(model, **options), options.get("seed") or 0, PartialState().is_main_process
    collator = MiniMindVDataCollator(engine.processor)
    dataset = MiniMindVDataset(data, engine.processor.allowed_hosts)
    rows: Any = Subset(dataset, range(len(dataset))[:limit])
    digest, keys = read_contents(rows, collator)
    columns = {name: read_column(dataset, len(rows), name) for name in by}
    if shuffle_images:
        rows = ShuffledImages(rows, keys, seed)

    weights = hashlib.sha256(engine.processor.image_processor.to_json_string().encode())
    update_digest(weights, dict(engine.model.named_parameters()))
    about = {
        "model": name_of(model),
        "data": name_of(data) if isinstance(data, (str, Path)) else type(data).__name__,
        "rows": len(rows),
        "answers": describe_options(options),
        "shuffled_images": shuffle_images,
        "seed": seed,
        "with": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    run = about | {"dtype": str(engine.model.dtype), "weights": weights.hexdigest(), "contents": digest}
    batches = [range(len(rows))[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    output.mkdir(parents=True, exist_ok=True)
    with locked(output) if is_main else contextlib.nullcontext():
        if is_main:
            begin(output, run)
            gather_answers(output, batches)
        answer_left(engine, collator, rows, batches, output)
        if is_main:
            records = [*gather_answers(output, batches).values()]
            columns = {"language": [language_of(record["truth"]) for record in records]} | columns
            results = about | {"all": compute_figures(records, seed)}
            results["by"] = {
                column: {value: compute_figures(chosen, seed) for value, chosen in split(records, values).items()}
                for column, values in columns.items()
            }
            write_file(output / "report.html", render_report(results, records, rows, engine.processor))
            if not shuffle_images:
                entries = list_results(results)
                metadata = ModelCardData(model_name=about["model"], eval_results=entries)
                write_file(output / "model_index.yaml", metadata.to_yaml() + "\n")
                if card:
                    update_card(Path(model), entries)
            write_file(output / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
        PartialState().wait_for_everyone()
    return read_json(output / "results.json")


def name_of(path: str | Path) -> str:
    return Path(path).resolve().name


def read_contents(rows: Any, collator: MiniMindVDataCollator) -> tuple[str, list[list[str]]]:
    """A hash of all that the model will read, and of each row the hashes of its images.

    Raises:
        ValueError: There are no rows, or some that cannot be evaluated.
    """
    if not len(rows):
        raise ValueError("The data has no rows. Give at least one question with its answer.")
    digest, keys, broken = hashlib.sha256(), [], {}
    for item in tqdm(rows, desc="reading", unit="row", leave=False, disable=bar_is_hidden()):
        encoded, problem = collator.try_to_encode(item)
        if encoded is None:
            broken[item["row"]] = problem
        elif len(encoded["input_ids"]) > collator.max_length:
            broken[item["row"]] = f"{len(encoded['input_ids'])} tokens are more than {collator.max_length}"
        elif set(encoded["labels"]) == {IGNORE_INDEX}:
            broken[item["row"]] = "the chat template marks no token of the answer ({% generation %})"
        else:
            keys.append([content_key(image) for image in images_of(item["messages"])])
            digest.update(json.dumps([encoded["input_ids"], encoded["labels"], keys[-1]]).encode())
    if broken:
        raise ValueError(f"{len(broken)} of {len(rows)} rows cannot be evaluated:\n{describe(broken)}\nMend them.")
    return digest.hexdigest(), keys


def bar_is_hidden() -> bool | None:
    """`disable` of a progress bar: one process shows it, in a terminal."""
    return None if PartialState().is_local_main_process else True


def read_column(dataset: MiniMindVDataset, count: int, name: str) -> list[str]:
    """Values of a column in the first `count` rows, "none" where a row has none.

    Raises:
        ValueError: No row has it.
    """
    values, names = [], set()
    for row in (dataset.rows[i] for i in range(count)):
        row = json.loads(row) if isinstance(row, str) else row
        names |= row.keys()
        values.append(str(row.get(name, "none")))
    if name not in names:
        raise ValueError(f"No row has the column {name}. There are {', '.join(sorted(names))}.")
    return values


def begin(output: Path, run: dict[str, Any]) -> None:
    """Makes sure that `output` is that of this run, or nobody's.

    Raises:
        FileExistsError: It holds something else.
        ValueError: It holds another evaluation.
    """
    path = output / "run.json"
    if path.exists():
        begun = read_json(path)
        if other := next((name for name in run if begun.get(name) != run[name]), None):
            change = f"{other} {begun.get(other)!s:.40} instead of {run[other]!s:.40}"
            raise ValueError(f"{output} holds another evaluation, with {change}. Choose another --output.")
    elif any(output.iterdir()):
        raise FileExistsError(f"{output} holds something else than an evaluation. Choose another --output.")
    else:
        write_file(path, json.dumps(run, ensure_ascii=False, indent=1))


def write_file(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def gather_answers(output: Path, batches: Iterable[Sequence[int]]) -> dict[int, Record]:
    """Moves what all processes have written, also before an interruption, into `answers.jsonl`, and returns it.

    Of each batch all answers are kept or none: a batch answered anew in part could differ in the last digit.
    """
    parts, records = sorted(output.glob("answers.jsonl*")), {}
    for line in [line for part in parts for line in part.read_bytes().split(b"\n")]:
        with contextlib.suppress(ValueError):  # a line whose writing was cut off
            record = json.loads(line)
            records[record["row"]] = record
    whole = [batch for batch in batches if all(row in records for row in batch)]
    records = {row: records[row] for batch in whole for row in batch}
    write_file(output / "answers.jsonl", "".join(map(to_line, records.values())))
    for part in parts:
        if part.name != "answers.jsonl":
            part.unlink()
    return records


def to_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def answer_left(
    engine: Engine, collator: MiniMindVDataCollator, rows: Any, batches: Sequence[Sequence[int]], output: Path
) -> None:
    """Answers this process's share of the batches that `answers.jsonl` has not yet; returns when all have theirs."""
    state, path = PartialState(), output / "answers.jsonl"
    state.wait_for_everyone()
    done = {json.loads(line)["row"] for line in path.read_bytes().splitlines()}
    state.wait_for_everyone()
    if state.num_processes > 1:
        path = output / f"answers.jsonl.{state.process_index}"
    with state.split_between_processes([batch for batch in batches if batch[0] not in done]) as share:
        total = sum(map(len, share))
        with (
            open(path, "a", encoding="utf-8") as file,
            tqdm(total=total, desc="answering", unit="row", leave=False, disable=bar_is_hidden()) as bar,
        ):
            for batch in share:
                file.writelines(map(to_line, answer_batch(engine, collator, [rows[i] for i in batch])))
                file.flush()  # so that an interruption loses no more than a batch
                bar.update(len(batch))
    state.wait_for_everyone()


@torch.inference_mode()
def answer_batch(engine: Engine, collator: MiniMindVDataCollator, items: list[dict[str, Any]]) -> list[Record]:
    """Answers to the last questions of some rows, with their scores and the losses of the true answers."""
    chats, truths = zip(*(split_last_answer(item["messages"]) for item in items), strict=True)
    answers = engine.answer(encode(engine.processor, list(chats), engine.template_options))
    batch = {name: tensor.to(engine.device) for name, tensor in collator(items).items()}
    labels = batch.pop("labels")[:, 1:]
    logits = engine.model(**batch).logits[:, :-1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    tokens = (labels != IGNORE_INDEX).sum(1)
    means = (losses.sum(1) / tokens).tolist()
    return [
        {"row": item["row"], "question": text_of(chat[-1]), "answer": answer, "truth": truth}
        | score_answer(answer, truth)
        | {"loss": loss, "tokens": count}
        for item, chat, answer, truth, loss, count in zip(
            items, chats, answers, truths, means, tokens.tolist(), strict=True
        )
    ]


def split(records: Sequence[Record], values: Sequence[str]) -> dict[str, list[Record]]:
    """The records of each value, in the order of the values' names."""
    return {
        value: [record for record, other in zip(records, values, strict=True) if other == value]
        for value in sorted(set(values))
    }


def show(model: str, data: str, output: str, **options: Any) -> None:
    """The command `minimind-v evaluate`: prints what [`evaluate`], which explains the arguments, finds."""
    results = evaluate(model, data, output, **options)
    if PartialState().is_main_process:
        for title, figures in list_figures(results).items():
            print(f"{title}, {figures['rows']} rows")
            for name in METRICS:
                if name in figures:
                    print(f"  {name.replace('_', ' '):12} {describe_figure(name, figures[name])}")
        print(f"The worst answers first, with pictures: {Path(output) / 'report.html'}")
