"""What a stranger sees who has a published folder, transformers, torch and pillow, and nothing else.

[`verify`] runs this file in a fresh process, with nothing of the user's around it; it imports nothing of this package:

    python checks.py FOLDER RESULT.json [CHECKPOINT]

First the files are looked at; only if they are what they should be is their code run.
"""

import ast
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image, ImageOps
from safetensors import safe_open

CODE = sorted(path.name for path in Path(__file__).resolve().parents[1].glob("*_minimind_v.py"))
CONFIGURATION = ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"]
SAVED = [*CONFIGURATION, "chat_template.jinja", "tokenizer.json", *CODE]  # by save_pretrained, besides the weights
REQUIRED = {*SAVED, "LICENSE", "README.md", "example.png"}
INDEX = "model.safetensors.index.json"
PROMPT = "Describe this image."
# Pipelines get a copy until 5.20 is the lower bound: before it they write into what they are given
GREEDY = {"max_new_tokens": 32, "do_sample": False}


@dataclasses.dataclass
class Check:
    """One line of a report."""

    name: str
    ok: bool
    detail: str


def supported_transformers() -> str:
    """The versions that this package's metadata ask for, such as ">=5.19.0"."""
    requirements = map(Requirement, importlib.metadata.requires("minimind-v") or [])
    return str(next(requirement.specifier for requirement in requirements if requirement.name == "transformers"))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def card_images(card: str) -> set[str]:
    """Names of the image files that a card shows and that stand in its folder."""
    names = {first or second for first, second in re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]+src=\"([^\"]+)", card)}
    return {name for name in names if re.fullmatch(r"[\w.-]+\.(gif|jpe?g|png|svg|webp)", name)}


# --- The files -------------------------------------------------------------------------------------------------------


def check_files(folder: Path) -> str:
    """Nothing is missing, nothing else is there: above all no pickle."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    expected = REQUIRED | {"model.safetensors"}
    if INDEX in found:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        expected = REQUIRED | {INDEX, *index["weight_map"].values()}
    if missing := sorted(expected - found):
        raise ValueError(f"missing: {', '.join(missing)}")
    if stray := sorted(found - expected - card_images((folder / "README.md").read_text(encoding="utf-8"))):
        raise ValueError(f"do not belong here: {', '.join(stray)}")
    sizes = {name: (folder / name).stat().st_size for name in found}
    if empty := sorted(name for name in found if not sizes[name]):
        raise ValueError(f"empty: {', '.join(empty)}")
    largest = max(sizes, key=lambda name: sizes[name])
    total, most = sum(sizes.values()) / 1e6, sizes[largest] / 1e6
    return f"{len(found)}, {total:.1f} MB ({largest} {most:.1f} MB), none missing, none stray, no pickle"


def check_weights(folder: Path) -> str:
    """Every header is valid, every number finite, no matrix all zeros."""
    dtypes = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # raises on a header that does not fit the file
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if not tensor.isfinite().all():
                    raise ValueError(f"{path.name}: {name} holds NaN or infinity")
                if tensor.ndim > 1 and not tensor.any():
                    raise ValueError(f"{path.name}: {name} holds only zeros")
                dtypes.append(str(tensor.dtype).removeprefix("torch."))
    return (
        f"{len(dtypes)} tensors of {' and '.join(sorted(set(dtypes)))}, headers valid, no NaN, infinity or mere zeros"
    )


def check_code(folder: Path) -> str:
    """It imports what every user has, and itself."""
    allowed, used = {"torch", "transformers", "huggingface_hub", "PIL", "numpy", *sys.stdlib_module_names}, set()
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f".{node.module}" if node.level else (node.module or "").split(".")[0]]
            else:
                continue
            for name in names:
                if name not in allowed and f"{name[1:]}.py" not in CODE:
                    raise ValueError(f"{path.name}:{node.lineno} imports {name}")
            used.update(names)
    used = sorted(name for name in used - sys.stdlib_module_names if not name.startswith("."))
    return f"imports {', '.join(used)}, the standard library and itself"


def check_privacy(folder: Path) -> str:
    """No access token, and no path of this machine: files of any kind may keep where a model was loaded from."""
    for path in sorted(folder.iterdir()):
        text, content = "", {}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                content = file.metadata() or {}
            text = json.dumps(content)
        elif path.suffix in (".json", ".md", ".jinja", ".py"):
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else {"": text if path.suffix == ".md" else ""}
        elif path.suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
            with Image.open(path) as image:
                content = {name: value for name, value in image.info.items() if isinstance(value, str)}
            text = json.dumps(content)
        if re.search(r"hf_[A-Za-z0-9]{30,}", text):
            raise ValueError(f"{path.name} holds an access token")
        if path.name == "tokenizer.json":
            del content["model"]  # a vocabulary may well have "/usr"
        for word in (word for value in strings(content) for word in re.split(r"[\s\"',;=`()<>]|file://", value)):
            if is_path_here(word):
                raise ValueError(f"{path.name} names {word}, a path of this machine")
    return "no access token, no path of this machine"


def strings(content: Any) -> Iterator[str]:
    """All strings in the content of a JSON file."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for value in (*content, *content.values()) if isinstance(content, dict) else content:
            yield from strings(value)


def is_path_here(word: str) -> bool:
    """Whether this is an absolute path that exists, or one in the user's home."""
    path = Path(word)
    return path.is_absolute() and len(path.parts) > 1 and (os.path.exists(path) or path.is_relative_to(Path.home()))


def check_card(folder: Path) -> str:
    """The Hub's own classes read its metadata, which say what the Hub shows; its images are there."""
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    expected = ("library_name", "pipeline_tag", "license", "language", "tags", "widget")
    if missing := [key for key in expected if not data.get(key)]:
        raise ValueError(f"README.md does not say {', '.join(missing)}")
    if lost := sorted(name for name in card_images(card.text) if not (folder / name).exists()):
        raise ValueError(f"README.md shows {', '.join(lost)}, which is not there")
    return f"{data['library_name']}, {data['pipeline_tag']}, licence {data['license']}"


def check_versions(folder: Path) -> str:
    """The running transformers is a supported one, and so is the one that wrote the configuration."""
    supported, written = supported_transformers(), read_config(folder)["transformers_version"]
    for version in (transformers.__version__, written):
        if not SpecifierSet(supported).contains(version, prereleases=True):
            raise ValueError(f"transformers {version} is not {supported}")
    return f"transformers {supported}, written by {written}, checked with {transformers.__version__}"


FILE_CHECKS = {
    "files": check_files,
    "weights": check_weights,
    "code": check_code,
    "privacy": check_privacy,
    "card": check_card,
    "versions": check_versions,
}


# --- The model -------------------------------------------------------------------------------------------------------


class Stranger:
    """Uses the model as its readers will. Each of `checks` needs what those before it loaded."""

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        self.folder, self.checkpoint, self.path = folder, checkpoint, str(folder / "example.png")
        self.image = Image.open(self.path).convert("RGB")
        self.question = [{"type": "image", "image": self.image}, {"type": "text", "text": PROMPT}]

    def checks(self) -> dict[str, Callable[[], str]]:
        checks: dict[str, Callable[[], str]] = {
            "auto classes": self.check_auto_classes,
            "pipelines": self.check_pipelines,
            "save and reload": self.check_reloading,
        }
        if self.checkpoint is not None:
            checks["same as source"] = partial(self.check_source, self.checkpoint)
        return checks | {"batch": self.check_batch}

    def load(self, name: str, source: Path, **options: Any) -> Any:
        return getattr(transformers, name).from_pretrained(source, trust_remote_code=True, **options)

    def ask(self, model: Any, processor: Any, *chats: list[dict]) -> list[str]:
        """The greedy answers to a batch of questions."""
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        answers = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]

    def check_auto_classes(self) -> str:
        names = [*read_config(self.folder)["auto_map"], "AutoTokenizer"]
        loaded = {name: self.load(name, self.folder) for name in names}
        self.processor = loaded["AutoProcessor"]
        self.model, loading = self.load("AutoModelForImageTextToText", self.folder, output_loading_info=True)
        if problems := {key: sorted(map(str, value)) for key, value in loading.items() if value}:
            raise ValueError(f"the weights do not fit: {problems}")
        self.answer = self.ask(self.model, self.processor, self.question)[0]
        for name in ("AutoModelForCausalLM", "AutoModelForMultimodalLM"):
            expect(self.ask(loaded[name], self.processor, self.question)[0], self.answer, name)
        return f"{', '.join(name.removeprefix('Auto') for name in names)} load"

    def check_pipelines(self) -> str:
        make_pipeline: Any = transformers.pipeline  # whose overloads know the library's own tasks only
        captioner, chatter = (
            make_pipeline(task, model=str(self.folder), device="cpu", trust_remote_code=True)
            for task in ("image-to-text", "image-text-to-text")
        )
        caption = captioner(self.path, prompt=PROMPT, generate_kwargs=dict(GREEDY))[0]["generated_text"]
        expect(caption, self.answer, "image-to-text")
        chat = [{"role": "user", "content": [{"type": "image", "image": self.path}, self.question[1]]}]
        text = chatter(text=chat, return_full_text=False, generate_kwargs=dict(GREEDY))[0]["generated_text"]
        expect(text.strip(), self.answer, "image-text-to-text")
        shown = ModelCard.load(self.folder / "README.md").data["widget"][0]["output"]["text"]
        expect(shown, caption, "the caption in the card")
        return f"image-to-text, image-text-to-text and the card say {caption!r:.60}"

    def check_reloading(self) -> str:
        again = Path("again")
        self.model.save_pretrained(again)
        self.load("AutoProcessor", self.folder).save_pretrained(again)  # a fresh one: padding leaves its traces
        for name in SAVED:
            texts = [(folder / name).read_text(encoding="utf-8") for folder in (again, self.folder)]
            saved, published = (re.sub(r'"transformers_version": "[^"]*"', "", text) for text in texts)
            expect(saved, published, f"{name} saved again")
        model = self.load("AutoModelForImageTextToText", again)
        expect(self.ask(model, self.load("AutoProcessor", again), self.question)[0], self.answer, "the reloaded model")
        return "the same files, the same answer"

    def check_source(self, checkpoint: Path) -> str:
        # With the code that is published and was looked at, whatever code the checkpoint has
        parts = (self.model, self.processor)
        model, processor = (type(part).from_pretrained(checkpoint, trust_remote_code=False) for part in parts)
        image = self.question[:1]
        for question in (self.question, image, [*image, *self.question]):
            given = self.ask(self.model, self.processor, question)
            expect(given, self.ask(model, processor, question), "the published model")
        return "3 greedy answers equal those of the checkpoint"

    def check_batch(self) -> str:
        images = [self.image, ImageOps.flip(self.image), ImageOps.invert(self.image)]
        chats = [[{"type": "image", "image": image}, self.question[1]] for image in images]
        chats.append([*chats[0], *chats[1]])
        self.model.float()  # half precision rounds differently in a batch: two equal candidates may change places
        alone = [self.ask(self.model, self.processor, chat)[0] for chat in chats]
        expect(self.ask(self.model, self.processor, *chats), alone, "a batch")
        return f"{len(chats)} rows of different lengths and numbers of images answer as each alone"


def expect(received: Any, expected: Any, name: str) -> None:
    if received != expected:
        raise ValueError(f"{name} gives {received!r:.200} instead of {expected!r:.200}")


# --- The process -----------------------------------------------------------------------------------------------------


def run_check(name: str, function: Callable[[], str]) -> Check:
    try:
        return Check(name, True, function())
    except Exception as error:  # whatever goes wrong in what is checked is a line of the report
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return Check(name, False, reason if type(error) is ValueError else f"{type(error).__name__}: {reason}")


def refuse_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise ConnectionError("the network was asked for while verifying")


def main(folder: Path, result: Path, checkpoint: Path | None = None) -> None:
    del sys.path[0]  # the folder of this file
    sys.modules["minimind_v"] = None  # pyright: ignore[reportArgumentType] - as if not installed
    sys.addaudithook(refuse_network)
    checks = [run_check(name, partial(function, folder)) for name, function in FILE_CHECKS.items()]
    if all(check.ok for check in checks):
        for name, function in Stranger(folder, checkpoint).checks().items():
            checks.append(run_check(name, function))
            if not checks[-1].ok:
                break
    result.write_text(json.dumps([dataclasses.asdict(check) for check in checks]), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
