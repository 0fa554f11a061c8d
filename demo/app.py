"""The web page, on gradio: chat with pictures, compare two, see where the model looks.

One model is in memory at a time, and gives one answer at a time. Nothing is loaded from elsewhere by the page, and
nothing is reported to anybody. What strangers may do: upload pictures, and ask.
"""

import contextlib
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

try:
    import gradio as gr
    from gradio.themes import Default
except ImportError as error:
    raise ImportError("The demo needs gradio: pip install 'minimind-v[demo]'") from error
import torch
from gradio_client.utils import is_http_url_like
from PIL import Image

from .. import EMBEDDED_MODEL
from ..common import WeightsError, read_json
from ..image_loading_minimind_v import load_image
from ..inference.engine import DEFAULT_MAX_NEW_TOKENS, Engine, encode, question
from ..pipeline_minimind_v import DEFAULT_PROMPT
from . import EXAMPLES, IMAGES
from .attention import Look, draw, look
from .texts import translate

QUESTIONS = ("What is this?", "这是什么？", "Describe this image.", "描述这张图片。")  # about EXAMPLES
ERROR = "error"  # marks a message that is no answer
REFRESH_SECONDS = 0.05  # Pages show no more in between
WIDTH = 320  # of a column at least, in pixels: on a phone, they stand below each other
SLIDERS = (  # name, least, most, default, step
    ("temperature", 0.05, 2, 0.65, 0.05),
    ("top_p", 0.05, 1, 0.85, 0.05),
    ("top_k", 1, 200, 50, 1),
    ("repetition_penalty", 1, 2, 1, 0.05),
    ("max_new_tokens", 1, 2048, DEFAULT_MAX_NEW_TOKENS, 1),
)
CSS = """
.gradio-container .main.fillable { max-width: 960px !important; }
.message img { width: min(300px, 55vw) !important; max-height: 36vh; object-fit: contain; border-radius: 8px; }
.image-frame img { width: 100%; height: 100%; object-fit: contain; }
.message-buttons-right { display: none !important; }  /* it shares with strangers */
"""
# How the page is launched, wherever
LAUNCH: dict[str, Any] = {
    "theme": Default(primary_hue="blue", neutral_hue="slate"),
    "css": CSS,
    "i18n": translate,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "mcp_server": False,
}


def find_models(given: Sequence[str] = ()) -> dict[str, str | Path]:
    """Checkpoints by the names that the page shows: those given, or else those in and below the current folder.

    The embedded one is always the last of them.
    """
    sources: dict[str, str | Path] = {str(source): source for source in given}
    if not given:
        configs = [path for depth in range(4) for path in sorted(Path().glob("*/" * depth + "config.json"))]
        found = [path.parent for path in configs if is_answering(path)]
        sources = {str(folder) if folder.name else Path.cwd().name: folder for folder in found}
    is_listed = any(Path(source).resolve() == EMBEDDED_MODEL for source in sources.values())
    if EMBEDDED_MODEL.exists() and not is_listed:
        sources[EMBEDDED_MODEL.name] = EMBEDDED_MODEL
    return sources


def is_answering(config: Path) -> bool:
    """Whether this is the `config.json` of a vision-language model of this package."""
    try:
        return read_json(config).get("model_type") == "minimind_v"
    except (AttributeError, OSError, ValueError):
        return False


class Demo:
    """What the page does.

    Args:
        sources: Checkpoints by name.
        allow_urls: Fetch pictures from the addresses in a question.
        options: For [`Engine`].
    """

    def __init__(self, sources: dict[str, str | Path], allow_urls: bool = False, **options: Any) -> None:
        self.sources, self.allow_urls, self.options = sources, allow_urls, options
        self.lock = threading.Lock()
        self.name: str | None = None
        self.engine: Engine | None = None

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Engine]:
        """A model, for one answer; the others wait. Another model than before takes the memory of that one.

        Raises:
            gr.Error: What was wrong, for the page, of the errors that the package raises.
        """
        try:
            with self.lock:
                if name != self.name:
                    self.name = self.engine = None
                    gc.collect()
                    torch.cuda.empty_cache()
                    self.engine = Engine(
                        self.sources[name], allowed_hosts=None if self.allow_urls else (), **self.options
                    )
                    self.name = name
                assert self.engine is not None  # it has a name
                yield self.engine
        except (OSError, ValueError, WeightsError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    # --- Questions

    def read(self, text: str, files: Sequence[str | dict[str, Any]], engine: Engine) -> dict[str, Any]:
        """A user's message: text, and pictures from files (of a retried one, dicts) and addresses in the text."""
        limits: dict[str, Any] = {"max_pixels": engine.processor.max_image_pixels}
        paths = [file["path"] if isinstance(file, dict) else file for file in files]
        images = [open_image(path, **limits) for path in paths]
        for url in re.findall(r"https?://\S+", text):
            if not self.allow_urls:
                raise ValueError(
                    "Pictures are not fetched from addresses here. Upload it, or start the demo with --allow-urls."
                )
            images.append(load_image(url, **limits))
            text = text.replace(url, "")
        if not (text.strip() or images):
            raise ValueError("There is no question. Write one, or add a picture.")
        return question(images, text.strip() or DEFAULT_PROMPT)

    def chat(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        model: str,
        greedy: bool,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        max_new_tokens: int,
        thinking: bool,
    ) -> Iterator[tuple[str, str]]:
        """The answer as it grows, and in the end its speed."""
        with self.use(model) as engine:
            template_options = set_decoding(
                engine, greedy, temperature, top_p, top_k, repetition_penalty, max_new_tokens, thinking
            )
            chat = [*self.answered(history, engine), self.read(message["text"], message["files"], engine)]
            inputs = encode(engine.processor, [chat], template_options)
            # MiniMind-3's template begins the thought; the page folds what stands between the two tags
            thought = "<think>\n"
            prompt = engine.processor.tokenizer.decode(inputs["input_ids"][0])
            answer, shown = thought if prompt.endswith(thought) else "", 0.0
            with contextlib.closing(engine.stream(inputs)) as pieces:
                for piece in pieces:
                    answer += piece
                    if time.monotonic() - shown > REFRESH_SECONDS:
                        yield answer, ""
                        shown = time.monotonic()
            yield answer.strip(), speed(engine)

    def chat_to_the_end(self, *arguments: Any) -> Iterator[tuple[Any, str]]:
        """[`chat`], with an error as a message in it: after one that is raised, gradio's chat takes no questions."""
        try:
            yield from self.chat(*arguments)
        except gr.Error as error:
            yield {"role": "assistant", "content": f"⚠️ {error.message}", "metadata": {"id": ERROR}}, ""

    def answered(self, history: list[dict[str, Any]], engine: Engine) -> list[dict[str, Any]]:
        """The chat so far as the model reads it, without thoughts and without questions that got no answer."""
        chat: list[dict[str, Any]] = []
        asked = None
        for message in history:
            content = message["content"] if isinstance(message["content"], list) else [message["content"]]
            texts = [part if isinstance(part, str) else part.get("text") for part in content]
            text = "\n".join(filter(None, texts))
            if message["role"] == "user":
                parts = [part for part in content if isinstance(part, dict) and "text" not in part]
                asked = text, [part.get("file", part)["path"] for part in parts]
            elif asked and text and not is_aside(message.get("metadata") or {}):
                chat += [self.read(*asked, engine), {"role": "assistant", "content": text}]
                asked = None
        return chat

    def compare(self, first: str, second: str, text: str, model: str, *decoding: Any) -> list[str]:
        """One question about the first of two pictures, about the second, and about both."""
        with self.use(model) as engine:
            template_options = set_decoding(engine, *decoding)
            if not (first and second):
                raise ValueError("Two pictures are needed. Add the missing one.")
            alone = [[self.read(text, [file], engine)] for file in (first, second)]
            both = [[self.read(text, [first, second], engine)]]
            return [
                answer
                for chats in (alone, both)
                for answer in engine.answer(encode(engine.processor, chats, template_options))
            ]

    def look(self, file: str, text: str, model: str, *decoding: Any) -> tuple[Look, Any, Image.Image, str, list]:
        """What [`look`] found, the words to choose from, the picture for the first, and the tokens."""
        with self.use(model) as engine:
            template_options = set_decoding(engine, *decoding)
            if not file:
                raise ValueError("There is no picture to look at. Add one.")
            image = open_image(file, engine.processor.max_image_pixels)
            found = look(engine, image, text.strip() or DEFAULT_PROMPT, template_options)
        words = gr.Radio(choices=[(word, place) for place, word in enumerate(found.words)], value=0)
        return found, words, *show_word(found, 0), found.seen

    # --- Models

    def describe(self, name: str) -> list[Any]:
        """What the page shows of a model, which is loaded for it, and the options that belong to it."""
        with self.use(name) as engine:
            config = engine.model.generation_config
            return [
                gr.Dropdown(info=engine.description),
                gr.Checkbox(visible=bool(engine.thinking_switches)),
                config.repetition_penalty or 1.0,
            ]


def set_decoding(engine: Engine, *decoding: Any) -> dict[str, Any]:
    """Sets how to answer.

    Args:
        engine: The model.
        decoding: The arguments of [`Engine.set_decoding`], and whether to think.

    Returns:
        What the chat template is to be told.
    """
    *options, thinking = decoding
    engine.set_decoding(*options)
    engine.tokens, engine.seconds = 0, 0.0
    return dict.fromkeys(engine.thinking_switches, thinking)


def is_aside(metadata: dict[str, Any]) -> bool:
    """Whether a message is no answer: a thought, which gradio gives a title, or an error."""
    return bool(metadata.get("title")) or metadata.get("id") == ERROR


def open_image(file: str, max_pixels: int) -> Image.Image:
    """An uploaded picture; errors name it without the folder that it was stored in."""
    with open(file, "rb") as content:
        return load_image(content, Path(file).name, max_pixels=max_pixels)


def show_word(found: Look, place: int) -> tuple[Image.Image, str]:
    """The picture for a word of the answer, and how much of the attention it has."""
    if not found.words:
        return found.image, ""
    values = found.maps[place]
    return draw(found.image, values), f"{translate('look_info')} {values.sum():.0%}"


def speed(engine: Engine) -> str:
    """Of the last answer."""
    return f"{translate('speed')} {engine.tokens / engine.seconds:.1f}"


# --- The page --------------------------------------------------------------------------------------------------------


def picture(*value: str, **options: Any) -> gr.Image:
    """A picture to add, which comes as it was uploaded: this package opens it, and says what is wrong with it."""
    component = gr.Image(*value, type="filepath", **options)
    component.preprocess = lambda payload: payload and payload.path
    return component


def build(demo: Demo) -> gr.Blocks:
    """The page, to be launched with [`LAUNCH`]."""
    names = list(demo.sources)
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Row():
            with gr.Column(min_width=WIDTH):
                gr.Markdown(f"# MiniMind-V\n{translate('about')}")
            with gr.Column(min_width=WIDTH):
                model = gr.Dropdown(names, value=names[0], label=translate("model"), info=" ", filterable=False)
        with gr.Accordion(translate("options"), open=False):
            greedy = gr.Checkbox(True, label=translate("greedy"), info=translate("greedy_info"))
            thinking = gr.Checkbox(False, label=translate("thinking"), visible=False)
            with gr.Row():
                sliders = [
                    gr.Slider(low, high, value, step=step, label=translate(name), info=translate(f"{name}_info"))
                    for name, low, high, value, step in SLIDERS
                ]
        decoding = [greedy, *sliders, thinking]
        with gr.Tab(translate("chat")):
            ask = gr.MultimodalTextbox(
                placeholder=translate("ask"),
                file_count="multiple",
                file_types=["image"],
                stop_btn=True,
                show_label=False,
            )
            rate = gr.Markdown(elem_id="rate", render=False)
            gr.ChatInterface(
                demo.chat_to_the_end,
                multimodal=True,
                chatbot=gr.Chatbot(
                    label=translate("conversation"),
                    height="54vh",
                    buttons=["copy"],
                    latex_delimiters=[],
                    reasoning_tags=[("<think>", "</think>")],
                    allow_file_downloads=False,
                ),
                textbox=ask,
                additional_inputs=[model, *decoding],
                additional_outputs=[rate],
                examples=[
                    [{"text": text, "files": [str(IMAGES / f"{name}.png")]}]
                    for name, text in zip(EXAMPLES, QUESTIONS, strict=True)
                ],
                cache_examples=False,
                api_name="chat",
                fill_height=False,
            )
            rate.render()
            with gr.Accordion(translate("camera"), open=False):
                camera = picture(sources=["webcam"], show_label=False, height=320)
            camera.input(add_picture, [camera, ask], [camera, ask], show_progress="hidden", api_visibility="private")
        with gr.Tab(translate("compare")):
            with gr.Row():
                pair = [
                    picture(str(IMAGES / f"{file}.png"), label=translate(name), height=320)
                    for name, file in (("first", "apple"), ("second", "pizza"))
                ]
            compare_question = gr.Textbox(translate("compare_question"), label=translate("question"))
            compare_button = gr.Button(translate("compare_button"), variant="primary")
            with gr.Row():
                answers = [gr.Textbox(label=translate(f"about_{name}")) for name in ("first", "second", "both")]
            gr.on(
                [compare_button.click, compare_question.submit],
                demo.compare,
                [*pair, compare_question, model, *decoding],
                answers,
                api_name="compare",
            )
        with gr.Tab(translate("look")):
            found = gr.State()
            with gr.Row():
                with gr.Column(min_width=WIDTH):
                    looked_at = picture(str(IMAGES / "dog.png"), label=translate("picture"), height=360)
                    look_question = gr.Textbox(translate("compare_question"), label=translate("question"))
                    look_button = gr.Button(translate("look_button"), variant="primary")
                with gr.Column(min_width=WIDTH):
                    spotlight = gr.Image(label=translate("attention"), interactive=False, height=360, buttons=[])
                    share = gr.Markdown()
                    words = gr.Radio([], label=translate("words"))
            seen = gr.HighlightedText(
                label=translate("seen"),
                color_map={"image": "orange", "control": "purple", "text": "blue"},
                show_inline_category=False,
            )
            gr.on(
                [look_button.click, look_question.submit],
                demo.look,
                [looked_at, look_question, model, *decoding],
                [found, words, spotlight, share, seen],
                api_name="look",
            )
            words.input(
                show_word, [found, words], [spotlight, share], show_progress="hidden", api_visibility="private"
            )
        settings = [model, thinking, sliders[3]]
        gr.on([page.load, model.input], demo.describe, model, settings, api_name="describe")
    if not demo.allow_urls:
        for component in page.blocks.values():
            component.async_move_resource_to_block_cache = only_files(component.async_move_resource_to_block_cache)
    return page


def add_picture(file: str, message: dict[str, Any]) -> tuple[None, dict[str, Any]]:
    """Puts what the camera took into the question."""
    return None, {"text": message["text"], "files": [*message["files"], file]}


def only_files(move: Callable) -> Callable:
    """gradio fetches a file that a request names by its address; this refuses to."""

    async def move_file(source: Any) -> Any:
        if is_http_url_like(str(source)):
            raise gr.Error("Pictures are not fetched from addresses here.", print_exception=False)
        return await move(source)

    return move_file


def serve(
    models: Sequence[str] = (),
    port: int | None = None,
    share: bool = False,
    device: str = "auto",
    allow_urls: bool = False,
) -> None:
    """Shows the page until it is interrupted.

    Args:
        models: Checkpoints; left out, those that [`find_models`] finds.
        port: Of 127.0.0.1; left out, the first free one from 7860 on.
        share: Also make it reachable for everybody, through gradio's servers.
        device: As for [`Engine`].
        allow_urls: Fetch pictures from the addresses in questions.
    """
    demo = Demo(find_models(models), allow_urls, device=device)
    page = build(demo)
    _, url, public_url = page.launch(
        server_name="127.0.0.1", server_port=port, share=share, quiet=True, prevent_thread_lock=True, **LAUNCH
    )
    print(
        f"The demo is on {url}{f' and, for everybody, on {public_url}' if share else ''} (Ctrl-C ends it)", flush=True
    )
    page.block_thread()
