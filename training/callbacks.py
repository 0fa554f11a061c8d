"""What happens beside the steps of a training: stopping on a signal, and answers to held-out questions."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..processing_minimind_v import MiniMindVProcessor
from .data import Rows, split_last_answer


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.former: dict[int, Any] = {}

    def receive(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.former[number] = signal.signal(number, self.receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The signal may have reached some processes one step later than others, and all must stop after the same.
        received: Any = reduce(torch.tensor(self.received or 0, device=args.device), "sum")
        if received.item():
            self.received = received.item()
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


class LogShortTraining(TrainerCallback):
    """A training with fewer steps than there are from one line of the log to the next has about ten lines anyway."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.max_steps < state.logging_steps:
            state.logging_steps = math.ceil(state.max_steps / 10)


class SampleAnswers(TrainerCallback):
    """After every evaluation, greedy answers to the first held-out rows: printed, and kept in `samples.jsonl`."""

    def __init__(self, rows: Rows, processor: MiniMindVProcessor, count: int) -> None:
        self.rows, self.processor = rows, processor
        self.count = min(count, len(rows))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any, **kwargs: Any
    ) -> None:
        lines = []
        for item in (self.rows[i] for i in range(self.count)):
            messages, expected = split_last_answer(item["messages"])
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(args.device)
            with torch.no_grad():  # on every process: the weights may be spread over them
                ids = model.eval().generate(**inputs, max_new_tokens=64, do_sample=False, use_cache=True)
            answer = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            lines.append({"step": state.global_step, "row": item["row"], "expected": expected, "answer": answer})
        if state.is_world_process_zero:
            with open(Path(args.output_dir or "") / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            for line in lines:
                tqdm.write(f"  row {line['row']}: {line['answer'].strip()!r}; expected {line['expected']!r}")
