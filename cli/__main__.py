"""Command line: minimind-v {caption,chat,compare,convert,train,check,upload} ...

Only the reading of the command line is here, without torch and transformers, so that `--help` and mistakes are
answered at once. For the same reason the entry point finds this folder under a second name, `minimind_v_cli`:
importing anything of `minimind_v` imports all of it.
"""

import functools
import inspect
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# What typer raises for a mistyped command line; the class itself has no public name.
UsageError: type[Exception] = typer.BadParameter.__base__

app = typer.Typer(
    help="MiniMind-V, a small vision-language model: describe pictures, talk about them, train, convert, publish.",
    epilog="\b\nExample:\n  minimind-v caption examples/images",
    context_settings={"max_content_width": 110},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@dataclass
class Options:
    """What `caption`, `chat` and `compare` have in common: the arguments of [`engine.Engine`], and `debug`."""

    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hub repository.", show_default="the embedded model")
    ] = None
    greedy: Annotated[
        bool | None,
        typer.Option("--greedy/--sample", help="Always the likeliest token, or drawn ones.", show_default=False),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="For --sample: below 1 bolder, above 1 wilder.", show_default="0.65")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="For --sample: from the likeliest of this total share.", show_default="0.85"),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=1, help="For --sample: from so many likeliest tokens.", show_default="50")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="Above 1, repetition becomes rarer.", show_default="1")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes --sample repeatable.")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default="the model's own, or else 512")
    ] = None
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="For models that can think before they answer.")
    ] = None
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Numbers to compute with; auto: float32 on a CPU, elsewhere as saved."),
    ] = "auto"
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model: a minute of waiting, then faster.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def command(*, greedy: bool, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command; it gets the options of [`Options`] too, as a dict of the arguments of [`engine.Engine`].

    Args:
        greedy: What the command does if no option speaks of sampling.
        example: For the end of its help.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(Options).parameters
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]
        parameters += shared.values()

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            options = {field.name: arguments.pop(field.name) for field in fields(Options)}
            options.pop("debug")
            drawn = [name for name in ("temperature", "top_p", "top_k") if options[name] is not None]
            if options["greedy"] and drawn:
                flag = "--" + drawn[0].replace("_", "-")
                raise typer.BadParameter(f"--greedy draws nothing, so {flag} has no effect. Leave one of them out.")
            model = options["model"]
            if model and not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
                raise typer.BadParameter(f"--model {model} is neither a folder nor USER/REPO of the Hub.")
            if options["greedy"] is None:
                options["greedy"] = greedy and not drawn
            function(**arguments, options=options)

        run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return app.command(epilog=f"\b\nExample:\n  {example}")(run)

    return register


@command(greedy=True, example='minimind-v caption photos "more/*.jpg" --output captions.jsonl --batch-size 16')
def caption(
    pictures: Annotated[list[str], typer.Argument(help="Files, folders, patterns such as 'photos/*.jpg', URLs.")],
    options: dict[str, Any],
    prompt: Annotated[str, typer.Option(help="What to ask about each picture.")] = "Describe this image.",
    output: Annotated[
        Path | None, typer.Option(help="File to append to, and to continue after an interruption.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures ahead.")] = 0,
) -> None:
    """Describe pictures: one JSON line each, with image, prompt, model and caption.

    A picture that cannot be read is reported and the rest go on; the exit status is 1 then. With --output, pictures
    that the file has already (with this prompt and model) are skipped. Captions are greedy, unless an option asks for
    sampling.

    \b
    On several GPUs:
      accelerate launch -m minimind_v_cli caption photos --output captions.jsonl
    """
    from minimind_v.inference.captioning import caption_pictures, find_pictures

    try:
        broken = caption_pictures(find_pictures(pictures), prompt, output, batch_size, workers, options)
    except KeyboardInterrupt:
        advice = f" The same command goes on where {output} ends." if output else ""
        typer.echo(f"\nInterrupted.{advice}", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(1 if broken else 0)


@command(greedy=False, example="minimind-v chat --image examples/images/apple.png")
def chat(
    options: dict[str, Any],
    image: Annotated[list[str] | None, typer.Option(help="Picture for the first question; may be repeated.")] = None,
) -> None:
    """Talk about pictures in the terminal.

    /image PATH adds a picture to the next question, /reset begins anew, /help, /exit. Answers are sampled, unless
    --greedy is given.
    """
    from minimind_v.inference.chatting import talk

    talk(image or [], options)


@command(greedy=True, example="minimind-v compare examples/images/apple.png examples/images/pizza.png")
def compare(
    a: Annotated[str, typer.Argument(help="First picture: file or URL.")],
    b: Annotated[str, typer.Argument(help="Second picture.")],
    options: dict[str, Any],
    prompt: Annotated[str, typer.Option(help="What to ask about the two.")] = "What do these two images show?",
) -> None:
    """Ask one question about two pictures. (The embedded model was trained on single ones.)"""
    from minimind_v.inference.chatting import ask_once

    ask_once([a, b], prompt, options)


def add_tool(name: str, summary: str, target: str, *first: str) -> None:
    """Registers another tool of this repository, a module or a script, which reads its options itself."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name, help=summary, context_settings=settings)
    def run(context: typer.Context) -> None:
        sys.argv[1:] = [*first, *context.args]
        if target.endswith(".py"):
            script = Path(find_spec("minimind_v").origin).with_name(target)
            sys.path.insert(0, str(script.parent))  # as Python does for a script
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)


add_tool("convert", "Turn a checkpoint of the original project into one of this package.", "minimind_v.conversion")
add_tool("train", "Train on your own pictures.", "minimind_v.training", "train")
add_tool("check", "Look at training data before training.", "minimind_v.training", "check")
add_tool("upload", "Publish a checkpoint on the Hub.", "hub_upload.py")


def main() -> None:
    """Runs the command line; errors are one line, with --debug a traceback."""
    # Chinese also where the terminal or the pipe is not UTF-8, and file names of any bytes
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="minimind-v", standalone_mode=False))
    except UsageError as error:
        print(f"error: {error.format_message().rstrip('.')}. See {error.ctx.command_path} --help.", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:  # Ctrl-C
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        sys.exit(f"error: {message} (--debug shows where.)")


if __name__ == "__main__":
    main()
