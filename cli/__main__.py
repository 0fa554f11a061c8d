"""Command line: minimind-v {caption,chat,compare,demo,check,train,evaluate,convert,export,upload} ...

Only the reading of the command line is here, without torch and transformers, so that `--help` and mistakes are
answered at once; each command imports what it runs. For the same reason this folder is a package of its own,
`minimind_v_cli`: importing anything of `minimind_v` imports all of it.
"""

import argparse
import difflib
import functools
import io
import math
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Commands = argparse._SubParsersAction
DEVICES = ("auto", "cpu", "cuda", "mps")


class Format(NamedTuple):
    """A form of `export`.

    Args:
        function: Of `minimind_v.export`.
        description, examples: As for [`add_command`].
        precisions: Of its weights; the first is the default.
        is_checked: Whether it can be asked questions.
    """

    function: str
    description: str
    examples: str
    precisions: tuple[str, ...] = ()
    is_checked: bool = True


class Parser(argparse.ArgumentParser):
    """argparse's parser with mistakes in one line, and lines of help that stay as they are written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        # argparse leaves unknown arguments to the outermost parser, which does not know the command's options.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            suggestion = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized argument {unknown[0]}{suggestion}")
        return namespace, unknown

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")


class ShowVersion(argparse.Action):
    """argparse's own action wants the version before anybody has asked for it, and reading it takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('minimind-v')}")
        parser.exit()


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """Type of an option: an int or a float within limits, which belong to it."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    read.__name__ = kind.__name__  # argparse's message names it
    return read


def model_name(text: str) -> str:
    """Type of an option: a folder that exists, or what may be a repository of the Hub."""
    if not Path(text).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text} is neither a folder nor USER/REPO of the Hub")
    return text


def answering_model(text: str) -> str:
    """Type of an option: as [`model_name`], or a file of weights of the original project."""
    return text if Path(text).is_file() else model_name(text)


# --- Parts of several commands ---------------------------------------------------------------------------------------


def add_command(
    commands: Commands,
    run: Callable[..., int | None],
    usage: str,
    description: str,
    examples: str,
    name: str | None = None,
    **options: Any,
) -> Parser:
    """Adds the parser of a command.

    Args:
        commands: Where to add it.
        run: Runs the command on the arguments by name; returns the exit status.
        usage: The line of arguments.
        description: Its first sentence also stands in the list of commands.
        examples: Command lines.
        name: Of the command; left out, that of `run`.
        options: For the parser.

    Returns:
        The parser, without arguments yet.
    """
    parser = commands.add_parser(
        name or run.__name__,
        usage=f"%(prog)s {usage}",
        help=description.partition(".")[0],
        description=description,
        epilog=f"Examples:\n{examples}",
        **options,
    )
    parser.add_argument("--debug", action="store_true", help="as the last argument: show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


def answer_options(has_model: bool = True) -> Parser:
    """The options of all commands that ask a model: the arguments of [`minimind_v.inference.engine.Engine`].

    What is not given is left out, because the defaults stand there.

    Args:
        has_model: Whether the model is one of them.
    """
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("how to answer").add_argument
    if has_model:
        add(
            "--model",
            type=answering_model,
            metavar="FOLDER_OR_REPO",
            help="checkpoint, also one of the original, such as jingyaogong/minimind-3v (default: the embedded model)",
        )
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--sample", action="store_false", dest="greedy", help="drawn tokens")
    add("--temperature", type=number(float, 0.01), metavar="X", help="below 1 bolder, above 1 wilder (default: 0.65)")
    add("--top-p", type=number(float, 0, 1), metavar="X", help="draw from the likeliest of this share (default: 0.85)")
    add("--top-k", type=number(int, 1), metavar="N", help="draw from so many likeliest tokens (default: 50)")
    add("--repetition-penalty", type=number(float, 0.01), metavar="X", help="above 1, repetition becomes rarer")
    add(
        "--max-new-tokens", type=number(int, 1), metavar="N", help="longest answer (default: the model's, or else 512)"
    )
    add("--seed", type=int, metavar="N", help="makes --sample repeatable")
    add("--thinking", action=argparse.BooleanOptionalAction, help="for models that can think before they answer")
    add("--device", choices=DEVICES, help="where to compute")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16", "int8"],
        help="numbers to compute with; auto: float32 on a CPU, elsewhere as saved; int8: faster on a CPU",
    )
    add("--compile", action="store_true", help="compile the model: a minute of waiting, then faster")
    add_limits(parser)
    return parser


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that read pictures."""
    add = parser.add_argument_group("pictures of strangers").add_argument
    add("--max-image-pixels", type=number(int, 1), metavar="N", help="refuse larger pictures (default: 210 million)")
    add(
        "--allowed-hosts",
        type=host_names,
        metavar="A,B",
        help="fetch pictures from these hosts only; '' fetches nothing (default: any public host)",
    )


def host_names(text: str) -> list[str]:
    """Type of an option: names with commas between, or none."""
    return [name.strip() for name in text.split(",") if name.strip()]


def settle(options: dict[str, Any], greedy: bool) -> dict[str, Any]:
    """The answer options as the arguments of the engine.

    Args:
        options: As given.
        greedy: What holds where no option speaks of drawing.

    Raises:
        argparse.ArgumentError: The options contradict each other.
    """
    drawn = [name for name in ("temperature", "top_p", "top_k") if name in options]
    if options.get("greedy") and drawn:
        option = "--" + drawn[0].replace("_", "-")
        raise argparse.ArgumentError(None, f"--greedy draws nothing, so {option} has no effect: leave out one of them")
    return {"greedy": greedy and not drawn} | options


# --- caption, chat, compare ------------------------------------------------------------------------------------------


def add_caption(commands: Commands, answers: Parser) -> None:
    parser = add_command(
        commands,
        caption,
        usage="IMAGE [IMAGE ...] [options]",
        description="""\
Describe pictures. One JSON line each, with image, prompt, model and caption.

A picture that cannot be read is reported and the rest go on; the exit status
is 1 then. With --output, pictures that the file has already (with this prompt,
model and options) are skipped. Captions are greedy, unless an option asks for
sampling.""",
        examples="""\
  minimind-v caption photos "more/*.jpg" --output captions.jsonl --batch-size 16
  accelerate launch -m minimind_v_cli caption photos --output captions.jsonl  # several GPUs""",
        parents=[answers],
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files, folders, patterns such as 'photos/*.jpg', URLs"
    )
    parser.add_argument("--prompt", default="Describe this image.", help="what to ask (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to append to, and to continue after an interruption"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", default=8, help="pictures at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=number(int, 0),
        metavar="N",
        default=0,
        help="processes that read pictures ahead (default: %(default)s)",
    )


def caption(images: list[str], prompt: str, output: Path | None, batch_size: int, workers: int, **options: Any) -> int:
    options = settle(options, greedy=True)
    from minimind_v.inference.captioning import caption_images, find_images

    try:
        return 1 if caption_images(find_images(images), prompt, output, batch_size, workers, options) else 0
    except KeyboardInterrupt:
        advice = f" The same command goes on where {output} ends." if output else ""
        print(f"\nInterrupted.{advice}", file=sys.stderr)
        return 130


def add_chat(commands: Commands, answers: Parser) -> None:
    parser = add_command(
        commands,
        chat,
        usage="[options]",
        description="""\
Talk about pictures in the terminal.

/image PATH adds a picture to the next question, /reset begins anew, /help,
/exit. Answers are sampled, unless --greedy is given.""",
        examples="  minimind-v chat --image examples/images/apple.png",
        parents=[answers],
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        dest="images",
        metavar="IMAGE",
        help="picture for the first question; may be repeated",
    )


def chat(images: list[str], **options: Any) -> None:
    options = settle(options, greedy=False)
    from minimind_v.inference.chatting import talk

    talk(images, options)


def add_compare(commands: Commands, answers: Parser) -> None:
    parser = add_command(
        commands,
        compare,
        usage="IMAGE IMAGE [options]",
        description="Ask one question about two pictures. (The embedded model was trained on single ones.)",
        examples="  minimind-v compare examples/images/apple.png examples/images/pizza.png",
        parents=[answers],
    )
    parser.add_argument("images", nargs=2, metavar="IMAGE", help="file or URL")
    parser.add_argument(
        "--prompt", default="What do these two images show?", help="what to ask (default: %(default)s)"
    )


def compare(images: list[str], prompt: str, **options: Any) -> None:
    options = settle(options, greedy=True)
    from minimind_v.inference.chatting import ask_once

    ask_once(images, prompt, options)


def add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        demo,
        usage="[MODEL ...] [options]",
        description="""\
Try models on a web page. Chat with pictures, compare two, see where the model looks.

The page has a list of the models given, or else of those in and below the
current folder, and the embedded one. Only this machine can reach it.

With --browser, it is a smaller page, of one model that the browser runs
itself, and that minimind-v upload --space --browser publishes.""",
        examples="""\
  minimind-v demo
  minimind-v demo my-model jingyaogong/minimind-3v --port 8000
  minimind-v demo my-model --browser""",
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=answering_model,
        metavar="MODEL",
        help="folder or Hub repository, also of the original",
    )
    parser.add_argument(
        "--port",
        type=number(int, 1, 65535),
        metavar="N",
        help="where to listen (default: first free from 7860)",
    )
    parser.add_argument("--share", action="store_true", help="let everybody reach it, through gradio's servers")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: auto)")
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from the addresses in questions")
    parser.add_argument("--browser", action="store_true", help="let the browser run the model")
    parser.add_argument(
        "--scripts",
        metavar="FOLDER",
        help="of --browser: node_modules folder of @huggingface/transformers, whose scripts the page loads "
        "(default: the page loads them from cdn.jsdelivr.net, once)",
    )


def demo(browser: bool, scripts: str | None, models: list[str], port: int | None, **options: Any) -> None:
    if browser:
        if len(models) > 1:
            raise argparse.ArgumentError(None, f"--browser shows one model; got {len(models)}: leave out the others")
        if options != {"share": False, "device": "auto", "allow_urls": False}:
            raise argparse.ArgumentError(None, "with --browser, the browser does all: leave out the other options")
        from minimind_v.demo.browser import serve_page

        serve_page(*models, port=port, scripts=scripts)
    else:
        if scripts:
            raise argparse.ArgumentError(None, "--scripts is an option of --browser: add it")
        from minimind_v.demo.app import serve

        serve(models, port, **options)


# --- check, train, evaluate ------------------------------------------------------------------------------------------


def add_check(commands: Commands) -> None:
    parser = add_command(
        commands,
        check,
        usage="DATA [options]",
        description="""\
Look at training data before training.

Shows how many rows there are and how long, which are broken (the exit status
is 1 then), and which tokens are trained on.""",
        examples="  minimind-v check examples/images --html check.html",
    )
    parser.add_argument("data", metavar="DATA", help=".jsonl or .parquet file, or folder of pictures")
    parser.add_argument(
        "--model",
        type=model_name,
        metavar="FOLDER_OR_REPO",
        help="checkpoint whose processor is used (default: the embedded model)",
    )
    parser.add_argument("--max-length", type=number(int, 1), metavar="TOKENS", help="as for training")
    parser.add_argument(
        "--preview", type=number(int, 0), metavar="ROWS", default=3, help="rows to show in full (default: %(default)s)"
    )
    parser.add_argument("--html", dest="html_file", metavar="FILE", help="page to write, with pictures")
    parser.add_argument(
        "--workers",
        type=number(int, 0),
        metavar="N",
        default=0,
        help="processes that read rows (default: %(default)s)",
    )
    add_limits(parser)


def check(data: str, model: str | None, **options: Any) -> int:
    from minimind_v import EMBEDDED_MODEL
    from minimind_v.training.check import show

    return 1 if show(data, model=model or EMBEDDED_MODEL, **options) else 0


def add_train(commands: Commands) -> None:
    """For its help only: training reads its options itself, as fields of a dataclass, see [`parse`]."""
    parser = add_command(
        commands,
        train,
        usage="--model CHECKPOINT --data DATA [options]",
        description="""\
Train on your own pictures.

All options of transformers' TrainingArguments work; the ones used most are
below, minimind-v train --help-all lists every one.""",
        examples="""\
  minimind-v train --model checkpoints/minimind-v-emoji --data examples/images \\
      --output-dir my-model --num-train-epochs 30 --learning-rate 5e-4
  accelerate launch -m minimind_v_cli train --model ...  # several GPUs""",
    )
    parser.add_argument("--help-all", action="store_true", help="list every option")
    own = parser.add_argument_group("this package's options").add_argument
    own("--model", metavar="CHECKPOINT", help="folder or Hub repository to start from")
    own("--data", help="training data: .jsonl, .parquet, or a folder of pictures with metadata.jsonl")
    own("--eval-data", metavar="DATA", help="held-out data: its loss, and answers in samples.jsonl, after every epoch")
    own("--eval-fraction", metavar="0.1", help="instead of --eval-data: share of the data to hold out")
    own("--num-samples", metavar="4", help="held-out rows that are answered at every evaluation")
    own("--stage", metavar="{pretrain,sft}", help="train the projector only, or projector and decoder (default: sft)")
    own("--freeze-llm", metavar="{0,1,2}", help="of sft: all of the decoder, its first and last layer, none of it")
    own("--lora-rank", metavar="8", help="of sft: low-rank adapters in the decoder, merged into it at the end")
    own("--max-length", metavar="TOKENS", help="longer rows are left out whole (default: the model's positions)")
    own(
        "--packing", metavar="true", help="the rows of a batch in one, without padding, with the loss of separate ones"
    )
    own(
        "--cache-image-features", metavar="DIR", help="the tower sees each picture once; later epochs read this folder"
    )
    own("--check-data", metavar="false", help="do not read every row before the first step")
    own("--on-broken", metavar="skip", help="leave broken rows out, instead of listing them and stopping")
    own("--overwrite", action="store_true", help="delete what the output folder holds, and begin anew")
    add_limits(parser)
    library = parser.add_argument_group("options of transformers' TrainingArguments").add_argument
    library("--output-dir", metavar="DIR", help="folder of checkpoints and the result (default: minimind-v-output)")
    library("--num-train-epochs", metavar="3", help="how often every row is seen")
    library("--max-steps", metavar="STEPS", help="instead of epochs")
    library("--learning-rate", metavar="1e-4", help="default: 4e-4 for pretrain, 5e-6 for sft, 2e-2 with --lora-rank")
    library("--per-device-train-batch-size", metavar="16", help="rows per step and device")
    library("--gradient-accumulation-steps", metavar="1", help="steps whose gradients make one update")
    library("--bf16", metavar="true", help="train in bfloat16, on GPUs that have it")
    library("--gradient-checkpointing", metavar="true", help="less memory, slower")
    library("--dataloader-num-workers", metavar="4", help="processes that read rows")
    library("--save-steps", metavar="500", help="steps between two checkpoints")
    library("--logging-steps", metavar="10", help="steps between two lines of the log")
    library("--resume-from-checkpoint", metavar="latest", help="go on after Ctrl-C or a crash, bit for bit the same")
    library("--report-to", metavar="tensorboard", help="or any other of the library's loggers")
    library("--seed", metavar="42", help="of order and dropout")


def train(argv: list[str]) -> None:
    from minimind_v.training.train import main

    main(["--help"] if "--help-all" in argv else argv)


def add_evaluate(commands: Commands) -> None:
    parser = add_command(
        commands,
        evaluate,
        usage="MODEL DATA [options]",
        description="""\
Measure a model on held-out data. Loss, exact match, accuracy, chrF and BLEU.

Writes results.json, answers.jsonl, report.html (the worst answers first, with
their pictures) and model_index.yaml. An interrupted run goes on where it
stopped. Answers are greedy, unless an option asks for sampling. --seed is
also that of the confidence intervals and of --shuffle-images.""",
        examples="""\
  minimind-v evaluate my-model held-out.jsonl --output my-evaluation --by kind
  minimind-v evaluate my-model held-out.jsonl --output shuffled --shuffle-images
  accelerate launch -m minimind_v_cli evaluate my-model held-out.jsonl  # several GPUs""",
        parents=[answer_options(has_model=False)],
    )
    parser.add_argument(
        "model", type=answering_model, metavar="MODEL", help="folder or Hub repository, also of the original"
    )
    parser.add_argument("data", metavar="DATA", help="as for train: .jsonl or .parquet file, or folder of pictures")
    parser.add_argument(
        "--output", metavar="DIR", default="minimind-v-evaluation", help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--by", action="append", default=[], metavar="COLUMN", help="figures for each of its values; may be repeated"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), metavar="N", default=8, help="rows at a time (default: %(default)s)"
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first rows")
    parser.add_argument(
        "--shuffle-images",
        action="store_true",
        help="ask about the pictures of other rows: a model that looks does worse",
    )
    parser.add_argument("--card", action="store_true", help="put the figures into the metadata of MODEL's README.md")


def evaluate(model: str, data: str, output: str, **options: Any) -> int:
    own = {name: options.pop(name) for name in ("by", "batch_size", "limit", "shuffle_images", "card")}
    options = settle(options, greedy=True)
    from minimind_v.training.evaluation import show

    try:
        show(model, data, output, **own, options=options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on with what is in {output}.", file=sys.stderr)
        return 130
    return 0


# --- convert, export, upload -----------------------------------------------------------------------------------------


def add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        convert,
        usage="CHECKPOINT OUTPUT [options]",
        description="""\
Turn a checkpoint of the original MiniMind-V into one that transformers loads, exactly.

Tower and tokenizer are the ones that the release was published with: found
where its README has them (such as ./model/siglip2-base-p32-256-ve), or else
fetched from the Hub (or its mirror HF_ENDPOINT).""",
        examples="""\
  from the Hub, or a file of weights:
    minimind-v convert jingyaogong/minimind-3v minimind-3v
    minimind-v convert out/sft_vlm_512.pth minimind2-v
  with parts of your own:
    minimind-v convert sft_vlm_768.pth minimind-3v \\
        --vision-encoder siglip2-base-p32-256-ve --tokenizer minimind-v/model
  a text-only MiniMind, to begin training a vision-language model:
    minimind-v convert llm_768.pth start --vision-encoder siglip2-base-p32-256-ve""",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".pth file, or folder or Hub repository")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument(
        "--vision-encoder", metavar="FOLDER_OR_REPO", help="CLIP or SigLIP tower (default: that of the release)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_REPO", help="where the tokenizer.json is (default: that of the release)"
    )
    parser.add_argument(
        "--config",
        dest="original_config",
        metavar="JSON",
        help="the original constructor's arguments (default: as released)",
    )
    parser.add_argument("--release", help="of the original (default: recognised from the tensors)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: kept as it is")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    parser.add_argument(
        "--from",
        dest="hub",
        choices=["huggingface", "modelscope"],
        default="huggingface",
        help="where to fetch from (default: %(default)s; the other needs the package modelscope)",
    )


def convert(checkpoint: str, output: str, dtype: str | None, **options: Any) -> None:
    import torch

    from minimind_v.conversion import convert_checkpoint

    print(convert_checkpoint(checkpoint, output, dtype=getattr(torch, dtype) if dtype else None, **options))


FORMATS = {
    "gguf": Format(
        "export_gguf",
        "GGUF files for llama.cpp and Ollama: the decoder, of MiniMind-3 also the tower.",
        "  minimind-v export gguf my-model my-model-gguf --precision q8_0",
        precisions=("q8_0", "f16", "f32", "q4_0"),
    ),
    "onnx": Format(
        "export_onnx",
        "Graphs for ONNX Runtime, and a program that asks them without torch and transformers.",
        "  minimind-v export onnx my-model my-model-onnx --precision int8",
        precisions=("float32", "int8", "int4"),
    ),
    "web": Format(
        "export_web",
        "Graphs for transformers.js, which runs them in a browser or in Node.",
        "  minimind-v export web my-model my-model-web",
        precisions=("int8", "int4", "float32"),
    ),
    "text": Format(
        "export_text_backbone",
        "The decoder as a plain Qwen3, Qwen3-MoE or Llama model, for MLX and others that know those.",
        "  minimind-v export text my-model my-model-text",
    ),
    "original": Format(
        "export_to_original",
        "A file of weights (.pth) with the names of the original project.",
        "  minimind-v export original my-model sft_vlm_768.pth",
        is_checked=False,
    ),
}


def add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        export,
        usage="FORMAT CHECKPOINT OUTPUT [options]",
        description="""\
Write a checkpoint in the form of another program, and check that it answers the same.

minimind-v export FORMAT --help says more of each.""",
        examples="\n".join(form.examples for form in FORMATS.values()),
    )
    formats = parser.add_subparsers(title="formats", metavar="FORMAT", prog="minimind-v export", required=True)
    for name, form in FORMATS.items():
        run = functools.partial(export, form.function)
        parser = add_command(formats, run, "CHECKPOINT OUTPUT [options]", form.description, form.examples, name=name)
        parser.add_argument(
            "checkpoint",
            type=answering_model,
            metavar="CHECKPOINT",
            help="folder or Hub repository, also one of the original",
        )
        parser.add_argument("output", metavar="OUTPUT", help="what to write")
        if form.precisions:
            first = form.precisions[0]
            parser.add_argument("--precision", choices=form.precisions, default=first, help=f"default: {first}")
        if form.is_checked:
            parser.add_argument(
                "--no-check",
                dest="check",
                action="store_false",
                help="do not ask output and checkpoint three questions",
            )
        else:
            parser.add_argument("--include-tower", action="store_true", help="with the vision tower")
        parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def export(function: str, checkpoint: str, output: str, **options: Any) -> None:
    from minimind_v import export
    from minimind_v.conversion import convert_once

    print(getattr(export, function)(convert_once(checkpoint), output, **options))


def add_upload(commands: Commands) -> None:
    parser = add_command(
        commands,
        upload,
        usage="CHECKPOINT USER/REPO [options]",
        description="""\
Publish a checkpoint on the Hub. Assembles a folder, verifies it in a fresh
process, and uploads it if it passes.

The token is the one of `hf auth login`, or HF_TOKEN.""",
        examples="""\
  minimind-v upload my-model USER/REPO --dry-run
  minimind-v upload my-model USER/REPO
  minimind-v upload my-model USER/SPACE --space
  minimind-v upload my-model USER/SPACE --space --browser""",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint")
    parser.add_argument(
        "--space", action="store_true", help="publish the web demo of it as a Space (CHECKPOINT may be on the Hub)"
    )
    parser.add_argument("--browser", action="store_true", help="of --space: the page whose visitors' browsers compute")
    parser.add_argument("repo_id", metavar="USER/REPO", help="repository on the Hub, made where there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write to, made where there is none")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing main")
    parser.add_argument("--tag", help="name for the new commit, such as v1")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0 (default: the card's)")
    parser.add_argument("--dry-run", action="store_true", help="do all but the network, and print what would be sent")
    parser.add_argument("--output", metavar="DIR", help="folder to assemble (default: CHECKPOINT-hub)")


def upload(checkpoint: str, repo_id: str, space: bool, browser: bool, **options: Any) -> int:
    if browser and not space:
        raise argparse.ArgumentError(None, "--browser is an option of --space: add it")
    if space:
        for name in ("revision", "create_pr", "tag"):
            if options.pop(name):
                raise argparse.ArgumentError(None, f"a Space has one version: leave out --{name.replace('_', '-')}")
    from minimind_v.publishing import publish, publish_space, publish_static_space

    run = publish_static_space if browser else publish_space if space else publish
    try:
        return 0 if run(checkpoint, repo_id, **options) else 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on: what has arrived is not sent again.", file=sys.stderr)
        return 1


# --- All commands ----------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="minimind-v",
        usage="%(prog)s COMMAND ...",
        description="MiniMind-V, a small vision-language model: "
        "describe pictures, talk about them, train, measure, convert, publish.",
        epilog="Examples:\n  minimind-v caption examples/images",
    )
    parser.add_argument(
        "--version", action=ShowVersion, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog=parser.prog, required=True)
    answers = answer_options()
    for add in (add_caption, add_chat, add_compare):
        add(commands, answers)
    for add in (add_demo, add_check, add_train, add_evaluate, add_convert, add_export, add_upload):
        add(commands)
    return parser


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """The arguments by name, among them `run`, the function for the others, its `parser`, and `debug`."""
    if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
        # All is left to training's own parser, but for a --debug in the end: the one of TrainingArguments has a value
        debug = argv[-1] == "--debug"
        return {"run": train, "parser": None, "debug": debug, "argv": argv[1:-1] if debug else argv[1:]}
    return vars(build_parser().parse_args(argv or ["--help"]))


def exit_on_sigterm() -> None:
    """Lets SIGTERM end this process as an error does, so that nothing half written stays behind."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: What stands after `minimind-v`; left out, the arguments of this process.

    Raises:
        SystemExit: With status 2 and one line for a mistyped command line, with the line for another error (unless
            `--debug` shows its traceback), and with the status of a command that ends with one.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata, for each of thousands of pictures
    # Chinese also where the terminal or the pipe is not UTF-8, and file names of any bytes
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    exit_on_sigterm()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    run, parser, debug = (arguments.pop(name) for name in ("run", "parser", "debug"))
    try:
        status = run(**arguments)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"error: {message} (--debug at the end shows where.)")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
