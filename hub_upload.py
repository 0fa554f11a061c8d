"""Publishes a checkpoint of this package on the Hub: assemble, verify, upload. Nothing is sent that was not loaded.

    python hub_upload.py my-model USER/REPO --dry-run

1. [`assemble`] writes everything that the repository will hold into a folder: weights, configuration, processor, code,
   licence and model card.
2. [`verify`] loads that folder as a stranger would: in a fresh process, offline, with empty caches and without this
   package.
3. [`upload`] sends what was verified, in one commit, and reads it back.

The network is used by `upload` only. The token is the one of `hf auth login` or HF_TOKEN; it is never printed.
"""

import argparse
import ast
import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # httpx's or httpx2's, whichever the library uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import SafetensorError, safe_open

HERE = Path(__file__).resolve().parent
TRANSFORMERS_RANGE = ">=5.16.1"
CODE = [f"{name}_minimind_v.py" for name in ("configuration", "image_loading", "modeling", "processing")]
TOKENIZER_FILES = ["chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
REQUIRED = {"config.json", "generation_config.json", "LICENSE", "README.md", "example.png", *CODE, *TOKENIZER_FILES}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# Files that decide what from_pretrained loads: those of an earlier version must not stay beside the new ones.
STALE = re.compile(
    r"(model|pytorch_model|adapter_)[^/]*\.(safetensors|bin|json)|[^/]*\.(py|pt|pth|pkl|jinja)|[^/]*_config\.json"
)
PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
BEGIN, END = "<!-- written by hub_upload.py: begin -->", "<!-- written by hub_upload.py: end -->"
PROMPT = "Describe this image."
GREEDY = {"max_new_tokens": 32, "do_sample": False}
# What Trainer and the training command leave behind, and how the card calls it
TRAINING_FACTS = {
    "stage": "stage",
    "num_train_epochs": "epochs planned",
    "epoch": "epochs",
    "global_step": "steps",
    "train_batch_size": "rows per step and device",
    "learning_rate": "learning rate",
    "rows_left_out": "rows left out",
    "train_loss": "training loss (mean)",
    "train_runtime": "seconds",
    "total_flos": "floating-point operations",
}


@dataclasses.dataclass
class Check:
    """One line of a [`Report`]."""

    name: str
    ok: bool
    detail: str


@dataclasses.dataclass
class Report:
    """What [`verify`] found; `str()` of it is the text that the command prints.

    `files` are the names and SHA-256 of what was verified: [`upload`] sends nothing else.
    """

    folder: str
    files: dict[str, str]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16} {check.detail}" for check in self.checks]
        failed = sum(not check.ok for check in self.checks)
        verdict = (
            f"{failed} of {len(self.checks)} checks failed" if failed else f"all {len(self.checks)} checks passed"
        )
        return "\n".join([*lines, f"{self.folder}: {verdict}"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}. Save the checkpoint again.") from error


# --- Assemble --------------------------------------------------------------------------------------------------------


def assemble(
    checkpoint: str | Path, output: str | Path, *, repo_id: str, license: str | None = None, overwrite: bool = False
) -> Path:
    """Writes all that the repository will hold into a folder, which appears only when it is complete.

    The weights are copied byte for byte; configuration, processor and tokenizer are written anew, with the code of this
    package. A card (`README.md`) of the checkpoint stays: its metadata win, its text stands first, and its own sections
    take the place of those with the same heading.

    Args:
        checkpoint: Folder written by `save_pretrained`, `Trainer`, or this package's commands.
        output: Folder to write.
        repo_id: `USER/REPO`, for the commands in the card.
        license: Licence of the weights, as the Hub calls it; left out, the card's, else `"apache-2.0"`.
        overwrite: Replace an `output` that is not empty.

    Returns:
        The output folder.

    Raises:
        FileNotFoundError: No such folder, no weights in safetensors, or no processor.
        FileExistsError: The output exists and is not empty.
        ValueError: Not a vision-language checkpoint of this package, or its weights or card are broken.
        OSError: The disk is full, or the output cannot be written.
    """
    checkpoint, output = Path(checkpoint).expanduser(), Path(output).expanduser()
    check_checkpoint(checkpoint)
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"The output {output} holds the checkpoint. Choose another folder with --output.")
    # Imported here, so that uploading and --help do not wait for torch, and the fresh process never sees the package
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    from minimind_v.conversion.convert import write_beside

    weights = [path for path in checkpoint.iterdir() if WEIGHTS.fullmatch(path.name)]
    with write_beside(output, overwrite) as folder, clear_disk_errors(output):
        needed, free = sum(path.stat().st_size for path in weights), shutil.disk_usage(output.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        config = AutoConfig.from_pretrained(checkpoint)
        model, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(checkpoint)
        if problems := {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}:
            raise ValueError(f"The weights of {checkpoint} do not fit its configuration: {problems}. Save it again.")
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in (*weights, *(HERE / name for name in [*CODE, "LICENSE"])):
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(HERE / "examples" / "images" / "apple.png", folder / "example.png")
        captioner = pipeline("image-to-text", model=model, processor=processor)
        caption = captioner(str(folder / "example.png"), prompt=PROMPT, generate_kwargs=GREEDY)[0]["generated_text"]
        card = write_card(checkpoint, model, weights, repo_id, license, caption)
        card.save(folder / "README.md")
        for name in pictures_of(card.text) - {"example.png"}:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
    return output


def check_checkpoint(checkpoint: Path) -> None:
    """Raises unless the folder has what a vision-language checkpoint of this package has."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder. Name the folder of a checkpoint.")
    if (checkpoint / "adapter_config.json").exists():
        raise ValueError(
            f"{checkpoint} holds a LoRA adapter, which does not load by itself. Merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
        )
    kind = read_json(checkpoint / "config.json").get("model_type")
    if kind != "minimind_v":
        hint = "the text-only decoder; " if kind == "minimind" else ""
        raise ValueError(
            f"{checkpoint} is not a vision-language checkpoint of this package: the model_type in its config.json is "
            f"{kind!r} ({hint}expected 'minimind_v'). Weights of the original project are turned into one by "
            "python -m minimind_v.conversion."
        )
    if not any(WEIGHTS.fullmatch(path.name) for path in checkpoint.iterdir()):
        raise FileNotFoundError(
            f"{checkpoint} has no model.safetensors. Save the model with model.save_pretrained({str(checkpoint)!r})."
        )
    if not (checkpoint / "tokenizer.json").exists() or not (
        (checkpoint / "processor_config.json").exists() or (checkpoint / "preprocessor_config.json").exists()
    ):
        raise FileNotFoundError(
            f"{checkpoint} has no processor (tokenizer.json and processor_config.json). Save the one that the model was "
            f"trained with beside it: processor.save_pretrained({str(checkpoint)!r})."
        )


@contextlib.contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """One clear OSError where the disk is full or closed."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"The weights cannot be read: {error}. Save the checkpoint again.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = (
                f"No room to write {output}: {error.strerror}. Free some space, or choose another disk with --output"
            )
            raise OSError(error.errno, message) from error
        raise


# --- Model card ------------------------------------------------------------------------------------------------------


def write_card(
    checkpoint: Path, model: Any, weights: list[Path], repo_id: str, license: str | None, caption: str
) -> ModelCard:
    """The card of the checkpoint, if it has one, with all that it does not say itself."""
    from minimind_v import __version__

    own_data, own_text = {}, ""
    if (checkpoint / "README.md").exists():
        try:
            own = ModelCard.load(checkpoint / "README.md")
        except Exception as error:  # YAML has many errors
            raise ValueError(f"The metadata of {checkpoint / 'README.md'} cannot be read: {error}") from error
        own_data = own.data.to_dict()
        own_text = re.sub(rf"{BEGIN}.*?{END}\n?", "", own.text.replace("\r\n", "\n"), flags=re.DOTALL).strip()
    facts = training_facts(checkpoint)
    name = repo_id.split("/")[-1]
    defaults = {"library_name": "transformers", "license": "apache-2.0", "language": ["en", "zh"]}
    defaults |= {"pipeline_tag": "image-text-to-text", "base_model": facts.pop("base_model", None)}
    data = ModelCardData(**defaults | own_data)
    data.tags = list(dict.fromkeys([*(data.tags or []), "image-to-text", "minimind_v", "vision-language-model"]))
    data.license = license or data.license
    data.widget = [{"src": "example.png", "text": PROMPT, "output": {"text": caption}}]
    if data.eval_results is None and (metrics := evaluation_metrics(checkpoint)):
        data.model_name = name
        data.eval_results = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type="held-out",
                dataset_name="held-out data of the training run",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
    dtypes = set()
    for path in weights:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                dtypes |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a dict
    config = model.config
    card = ModelCard.from_template(
        data,
        template_path=str(HERE / "hub_card_template.md"),
        title=name,
        tower={"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}[config.vision_config.model_type],
        parameters=parameter_table(model),
        dtypes=" and ".join(sorted(dtypes)),
        version=__version__,
        transformers_range=TRANSFORMERS_RANGE,
        repo_id=repo_id,
        prompt=PROMPT,
        caption=caption,
        training=facts,
        results=data.eval_results,
        image_size=config.vision_config.image_size,
        positions=config.text_config.max_position_embeddings,
        image_seq_length=config.image_seq_length,
    )
    title, *sections = re.split(r"^(?=## )", card.text.strip() + "\n", flags=re.MULTILINE)
    if own_text:  # what the user has a section of, or a title, is the user's
        taken = {heading.strip().lower() for heading in re.findall(r"^## +(.+)$", own_text, flags=re.MULTILINE)}
        sections = [text for text in sections if text.split("\n")[0].removeprefix("## ").lower() not in taken]
        title, own_text = "", own_text + "\n\n"
    card.text = f"\n{own_text}{BEGIN}\n{title}{''.join(sections)}{END}\n"
    return card


def parameter_table(model: Any) -> list[tuple[str, str, str]]:
    """(part, form, number of parameters) of tower, projector, decoder and all."""
    from minimind_v.conversion.convert import count_parameters

    counts, config, text = count_parameters(model), model.config, model.config.text_config
    experts = f"{text.num_experts} experts, {text.num_experts_per_tok} active" if text.use_moe else "dense"
    vision = config.vision_config
    forms = {
        "Tower": f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.image_size} px, patches of "
        f"{vision.patch_size}, {config.image_seq_length} tokens per picture",
        "Projector": config.projector_type,
        "Decoder": f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads "
        f"({text.num_key_value_heads} key/value), vocabulary {text.vocab_size}, {experts}",
    }
    total = sum(counts[part] for part in forms)
    rows = [(part, form, counts[part]) for part, form in forms.items()]
    if "active" in counts:
        rows.append(("active for one token", "", total - counts["Decoder"] + counts["active"]))
    return [(part, form, f"{count / 1e6:.2f}M") for part, form, count in [*rows, ("all", "", total)]]


def training_facts(checkpoint: Path) -> dict[str, Any]:
    """What the files of the training run say, under the names of the card; {} where there are none."""
    found: dict[str, Any] = {}
    for name in ("trainer_state.json", "all_results.json", "training_summary.json"):
        found |= read_json(checkpoint / name)
    facts = {title: found[key] for key, title in TRAINING_FACTS.items() if found.get(key) is not None}
    return {title: f"{value:.4g}" if isinstance(value, float) else value for title, value in facts.items()}


def evaluation_metrics(checkpoint: Path) -> dict[str, float]:
    """The metrics that the training run left, without its timings."""
    timing = ("runtime", "per_second")
    return {
        key: value
        for key, value in read_json(checkpoint / "all_results.json").items()
        if key.startswith("eval_") and not key.endswith(timing)
    }


def pictures_of(text: str) -> set[str]:
    """Files of the repository that a card shows."""
    links = re.findall(r"!\[[^\]]*\]\(([^)\s]+)[^)]*\)|<img[^>]+src=\"([^\"]+)\"", text)
    names = {first or second for first, second in links}
    return {name for name in names if "/" not in name and name.lower().endswith(PICTURES)}


# --- Verify ----------------------------------------------------------------------------------------------------------


def verify(folder: str | Path, checkpoint: str | Path | None = None) -> Report:
    """Loads an assembled folder as a stranger would, and looks into all of its files.

    In a fresh process: offline, with empty caches, without this package. Its code runs only when its files are right.

    Args:
        folder: What [`assemble`] wrote.
        checkpoint: Where it came from; left out, answers are not compared with it.

    Returns:
        A report; `report.ok` says whether every check passed.

    Raises:
        FileNotFoundError: No such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Assemble one first.")
    report = Report(str(folder), list_files(folder), [])
    with tempfile.TemporaryDirectory() as elsewhere:
        # Nothing of the user's: no token, no caches, no settings. (PATH and what finds Python's libraries stay.)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        environment |= {"HF_HOME": f"{elsewhere}/home", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, str(Path(__file__).resolve()), "--in-fresh-process", str(folder.resolve())]
        command += [
            f"{elsewhere}/checks.json",
            *([str(Path(checkpoint).expanduser().resolve())] if checkpoint else []),
        ]
        process = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        report.checks = [Check(**check) for check in read_json(Path(elsewhere, "checks.json")) or []]
        if process.returncode:
            reason = (process.stderr.strip() or "no message").splitlines()[-1]
            report.checks.append(Check("fresh process", False, f"ended with status {process.returncode}: {reason}"))
    return report


def check_files(folder: Path) -> str:
    """Nothing is missing, nothing else is there: above all no pickle."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if missing := sorted(REQUIRED - found):
        raise ValueError(f"missing: {', '.join(missing)}")
    index = read_json(folder / "model.safetensors.index.json")
    weights = {*index["weight_map"].values(), "model.safetensors.index.json"} if index else {"model.safetensors"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    if wrong := sorted(found ^ (REQUIRED | weights | (found & pictures_of(card)))):
        raise ValueError(f"stray or missing: {', '.join(wrong)}")
    sizes = {name: (folder / name).stat().st_size for name in found}
    if empty := sorted(name for name in found if not sizes[name]):
        raise ValueError(f"empty: {', '.join(empty)}")
    largest = max(sizes, key=sizes.get)
    total, most = sum(sizes.values()) / 1e6, sizes[largest] / 1e6
    return f"{len(found)} files, {total:.1f} MB, largest {largest} ({most:.1f} MB); no pickle, none missing or stray"


def check_weights(folder: Path) -> str:
    """Every header is valid, every number finite."""
    import torch

    tensors, dtypes = 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # raises on a header that does not fit the file
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{path.name}: {name} holds NaN or infinity")
                tensors += 1
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return f"{tensors} tensors of {' and '.join(sorted(dtypes))}, headers valid, no NaN or infinity"


def check_code(folder: Path) -> str:
    """Its code imports what every user has, and itself."""
    allowed = {"torch", "transformers", "PIL", "numpy", *sys.stdlib_module_names}
    used = set()
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                if not (folder / f"{node.module}.py").exists():
                    raise ValueError(f"{path.name}:{node.lineno} imports .{node.module or ''}, which is not there")
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                used |= {name.split(".")[0] for name in names}
                if strange := sorted({name.split(".")[0] for name in names} - allowed):
                    raise ValueError(f"{path.name}:{node.lineno} imports {', '.join(strange)}")
    return f"{len(CODE)} files import {', '.join(sorted(used - sys.stdlib_module_names))}, the standard library, themselves"


def check_privacy(folder: Path) -> str:
    """No access token, and no path of this machine (configurations keep where a model was loaded from)."""
    for path in folder.iterdir():
        text = path.read_bytes() if path.suffix in (".json", ".md", ".py", ".jinja") else b""
        if re.search(rb"\bhf_[A-Za-z0-9]{30,}", text):
            raise ValueError(f"{path.name} holds an access token")
        if path.name.endswith("config.json"):
            for value in re.findall(r'": "([^"]{2,})"', text.decode("utf-8")):
                if os.path.isabs(value) and os.path.exists(value):
                    raise ValueError(f"{path.name} names {value}, a path of this machine")
    return "no access token, no path of this machine"


def check_card(folder: Path) -> str:
    """Its metadata are read by the Hub's own classes and say what the Hub shows."""
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    expected = ("library_name", "pipeline_tag", "license", "language", "tags", "widget")
    if missing := [key for key in expected if not data.get(key)]:
        raise ValueError(f"README.md does not say {', '.join(missing)}")
    if lost := sorted(name for name in pictures_of(card.text) if not (folder / name).exists()):
        raise ValueError(f"README.md shows {', '.join(lost)}, which is not there")
    return f"{data['library_name']}, {data['pipeline_tag']}, licence {data['license']}, {len(card.text.splitlines())} lines"


def check_versions(folder: Path) -> str:
    """The running transformers is one that is supported, and so is the one that wrote the configuration."""
    import transformers
    from packaging.specifiers import SpecifierSet

    written = read_json(folder / "config.json").get("transformers_version") or "unknown"
    for version in (transformers.__version__, written):
        if not SpecifierSet(TRANSFORMERS_RANGE, prereleases=True).contains(version):
            raise ValueError(f"transformers {version} is not {TRANSFORMERS_RANGE}")
    return f"transformers {transformers.__version__} here, {TRANSFORMERS_RANGE} supported, written by {written}"


class Stranger:
    """Someone who has the folder and transformers, and nothing else. Each check needs those before it."""

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.trust = {"trust_remote_code": True}

    def checks(self) -> dict[str, Any]:
        checks = {"auto classes": self.check_auto_classes, "pipelines": self.check_pipelines}
        checks |= {"save and reload": self.check_reloading}
        if self.checkpoint is not None:
            checks["same as source"] = self.check_source
        return checks | {"batch": self.check_batch}

    def ask(self, model: Any, processor: Any, *chats: list[dict]) -> list[str]:
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
        import transformers
        from PIL import Image

        self.picture = Image.open(self.folder / "example.png").convert("RGB")
        self.question = [{"type": "image", "image": self.picture}, {"type": "text", "text": PROMPT}]
        names = [*read_json(self.folder / "config.json")["auto_map"], "AutoTokenizer"]
        loaded = {}
        for name in names:
            loaded[name] = getattr(transformers, name).from_pretrained(self.folder, **self.trust)
        self.processor, model_class = loaded["AutoProcessor"], transformers.AutoModelForImageTextToText
        self.model, loading = model_class.from_pretrained(self.folder, output_loading_info=True, **self.trust)
        if problems := {key: sorted(map(str, value)) for key, value in loading.items() if value}:
            raise ValueError(f"the weights do not fit: {problems}")
        self.answer = self.ask(self.model, self.processor, self.question)[0]
        for name in ("AutoModelForCausalLM", "AutoModelForMultimodalLM"):
            same(self.ask(loaded[name], self.processor, self.question)[0], self.answer, name)
        return f"{', '.join(names)} load; they answer the same"

    def check_pipelines(self) -> str:
        from transformers import pipeline

        path, options = str(self.folder / "example.png"), {"generate_kwargs": GREEDY}
        captioner = pipeline("image-to-text", model=str(self.folder), **self.trust)
        caption = captioner(path, **options)[0]["generated_text"]
        same(caption, self.answer, "image-to-text")
        chatter = pipeline("image-text-to-text", model=str(self.folder), **self.trust)
        chat = [{"role": "user", "content": [{"type": "image", "image": path}, self.question[1]]}]
        text = chatter(text=chat, return_full_text=False, **options)[0]["generated_text"]
        same(text.strip(), self.answer, "image-text-to-text")
        shown = ModelCard.load(self.folder / "README.md").data.widget[0]["output"]["text"]
        same(shown, caption, "the caption in the card")
        return f"image-to-text and image-text-to-text answer, as the card says: {caption!r}"

    def check_reloading(self) -> str:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        again = Path("again")
        self.model.save_pretrained(again)
        AutoProcessor.from_pretrained(self.folder, **self.trust).save_pretrained(again)  # not one that has padded
        for name in ("config.json", "generation_config.json", *CODE, *TOKENIZER_FILES):
            texts = [(folder / name).read_text(encoding="utf-8") for folder in (self.folder, again)]
            first, second = (re.sub(r'"transformers_version": "[^"]*"', "", text) for text in texts)
            same(second, first, f"{name} saved again")
        model = AutoModelForImageTextToText.from_pretrained(again, **self.trust)
        processor = AutoProcessor.from_pretrained(again, **self.trust)
        same(self.ask(model, processor, self.question)[0], self.answer, "the reloaded model")
        return "saved again, every file and the answer are the same"

    def check_source(self) -> str:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        with_code = (self.checkpoint / CODE[-1]).exists()
        model_class = AutoModelForImageTextToText if with_code else type(self.model)
        processor_class = AutoProcessor if with_code else type(self.processor)
        model = model_class.from_pretrained(self.checkpoint, **self.trust)
        processor = processor_class.from_pretrained(self.checkpoint, **self.trust)
        questions = [self.question, self.question[:1], [*self.question[:1], *self.question]]
        for question in questions:
            given = self.ask(self.model, self.processor, question)
            same(given, self.ask(model, processor, question), "the published model")
        return f"{len(questions)} greedy answers equal those of the checkpoint" + (", with its own code" * with_code)

    def check_batch(self) -> str:
        from PIL import ImageOps

        pictures = [self.picture, ImageOps.flip(self.picture), ImageOps.invert(self.picture)]
        chats = [[{"type": "image", "image": picture}, *self.question[1:]] for picture in pictures]
        chats.append([*chats[0][:1], *chats[1][:1], {"type": "text", "text": "What is in these pictures?"}])
        self.model.float()  # half precision rounds differently in a batch: two equal candidates may change places
        alone = [self.ask(self.model, self.processor, chat)[0] for chat in chats]
        same(self.ask(self.model, self.processor, *chats), alone, "a batch")
        return f"{len(chats)} rows of different lengths and numbers of pictures answer as each alone"


def same(received: Any, expected: Any, name: str) -> None:
    if received != expected:
        raise ValueError(f"{name} gives {received!r:.200} instead of {expected!r:.200}")


def check_in_fresh_process(folder: Path, result: Path, checkpoint: Path | None) -> None:
    """What [`verify`] starts: writes its checks as JSON."""
    sys.modules["minimind_v"] = None  # as if not installed
    sys.addaudithook(refuse_network)
    functions = {"files": check_files, "weights": check_weights, "code": check_code, "privacy": check_privacy}
    functions |= {"card": check_card, "versions": check_versions}
    checks = [run_check(name, partial(function, folder)) for name, function in functions.items()]
    if all(check.ok for check in checks):  # else its code is not run
        for name, function in Stranger(folder, checkpoint).checks().items():
            checks.append(run_check(name, function))
            if not checks[-1].ok:
                break
    result.write_text(json.dumps([dataclasses.asdict(check) for check in checks]), encoding="utf-8")


def run_check(name: str, function: Callable[[], str]) -> Check:
    try:
        return Check(name, True, function())
    except Exception as error:  # whatever goes wrong in what is checked is a line of the report
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return Check(name, False, reason if type(error) is ValueError else f"{type(error).__name__}: {reason}")


def refuse_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise ConnectionError(f"the network is used while verifying: {event} {arguments[-1:]}")


# --- Upload ----------------------------------------------------------------------------------------------------------


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    report: Report | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Sends a verified folder in one commit, and reads it back. The repository is made where there is none.

    Files that the repository has already are not sent again, and where nothing changed there is no commit. Weights, code
    and configurations of an earlier version, which would be loaded beside the new ones, are deleted in the same commit;
    other files of the repository stay. After an interruption the same call goes on.

    Args:
        folder: What [`assemble`] wrote.
        repo_id: `USER/REPO`.
        report: What [`verify`] found; left out, the folder is verified first.
        private: Make the repository private. (One that is public already is an error.)
        revision: Branch, made where there is none; left out, `main`.
        create_pr: Open a pull request instead of changing `main`.
        tag: Name for the commit, such as `"v1"`.
        message: First line of the commit.

    Returns:
        The commit; `oid` is the present one where nothing changed, `pr_url` the pull request.

    Raises:
        ValueError: The report has a failure, the folder changed since, a name is invalid, or the repository holds
            something else.
        PermissionError: No token, or one that may not write there.
        ConnectionError: The Hub cannot be reached, or the connection broke.
        OSError: The Hub refused, or what was read back differs.
    """
    check_target(repo_id, revision, create_pr, tag)
    check_token()
    folder = Path(folder).expanduser()
    report = report or verify(folder)
    if not report.ok:
        raise ValueError(f"{folder} is not uploaded, because it does not pass:\n{report}")
    files = list_files(folder)
    if files != report.files:
        names = sorted({name for name, _ in files.items() ^ report.files.items()})
        raise ValueError(f"{folder} has changed since it was verified: {', '.join(names)}. Verify it again.")
    with clear_hub_errors(repo_id):
        api = HfApi(library_name="minimind-v")
        open_repository(api, repo_id, private)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision).sha
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags} if tag else {}
        if tags.get(tag, head) != head:
            raise ValueError(f"{repo_id} has a tag {tag} already, of another commit. Choose another name with --tag.")
        operations: list = [CommitOperationAdd(name, str(folder / name)) for name in files]
        stale = [name for name in list_remote(api, repo_id, head) if STALE.fullmatch(name) and name not in files]
        operations += [CommitOperationDelete(name) for name in stale]
        message = message or "Upload MiniMind-V model"
        options = {"revision": revision, "create_pr": create_pr, "parent_commit": head}
        commit = api.create_commit(repo_id, operations, commit_message=message, **options)
        remote = list_remote(api, repo_id, commit.oid)
        different = [name for name in files if not is_same(remote.get(name), folder / name, files[name])]
        if different := different + [name for name in stale if name in remote]:
            raise OSError(f"{repo_id} does not hold what was sent: {', '.join(different)} differ. Run it again.")
        if tag and tags.get(tag) != commit.oid:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def check_target(repo_id: str, revision: str | None, create_pr: bool, tag: str | None) -> None:
    """Raises a ValueError unless the names and options can be meant."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error} Give it as USER/REPO.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} does not say whose repository it is. Give it as USER/REPO.")
    if create_pr and (tag or revision not in (None, "main")):
        raise ValueError("A pull request goes to main and has no tag yet: leave out --revision and --tag.")


def check_token() -> None:
    if get_token() is None:
        raise PermissionError(
            "No token of the Hub was found. Make one with write access at https://huggingface.co/settings/tokens, then "
            "run `hf auth login` or set HF_TOKEN."
        )


def list_files(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            files[path.name] = sha_fileobj(file).hex()
    return files


def open_repository(api: HfApi, repo_id: str, private: bool) -> None:
    """Makes the repository if there is none; raises a ValueError if it is not one for this model."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if api.repo_exists(repo_id, repo_type=kind):
                message = f"{repo_id} is a {kind}, not a model repository. Choose another name."
                raise ValueError(message) from None
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} is public already. Make it private in its settings first, or leave out --private."
        )
    if (kind := (info.config or {}).get("model_type", "minimind_v")) != "minimind_v":
        raise ValueError(f"{repo_id} holds a model of another type ({kind}). Choose another name.")


def list_remote(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def is_same(remote: RepoFile | None, path: Path, sha256: str) -> bool:
    if remote is None:
        return False
    return remote.lfs.sha256 == sha256 if remote.lfs else remote.blob_id == git_hash(path.read_bytes())


@contextlib.contextmanager
def clear_hub_errors(repo_id: str) -> Iterator[None]:
    """The library's errors, as built-in ones that say what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.") from error
    except (HTTPError, RuntimeError) as error:  # a RuntimeError wraps what happened while a large file was sent
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if not isinstance(cause, HfHubHTTPError):
            message = (
                f"The connection to the Hub failed ({type(cause).__name__}: {cause}). Check the network and run the "
            )
            raise ConnectionError(message + "same command again: what has arrived is not sent again.") from error
        status, said = cause.response.status_code, cause.server_message or str(cause).strip().splitlines()[0]
        if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
            raise PermissionError(
                f"The Hub does not let this token write to {repo_id} ({status}: {said}). Check the name, log in with a "
                "token that has write access to it (`hf auth login`), or propose the change with --create-pr."
            ) from error
        raise OSError(f"The Hub refused ({status}: {said}). Run the same command again in a while.") from error


# --- Command ---------------------------------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["--in-fresh-process"]:
        folder, result, *checkpoint = map(Path, sys.argv[2:])
        return check_in_fresh_process(folder, result, checkpoint[0] if checkpoint else None)
    parser = argparse.ArgumentParser(
        description="Publish a checkpoint on the Hub: assemble a folder, verify it in a fresh process, upload it.",
        epilog="The token is the one of `hf auth login`, or HF_TOKEN.",
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("repo_id", metavar="USER/REPO", help="repository on the Hub, made where there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write to, made where there is none")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing main")
    parser.add_argument("--tag", help="name for the new commit, such as v1")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0 (default: the card's)")
    parser.add_argument("--dry-run", action="store_true", help="do all but the network, and print what would be sent")
    parser.add_argument("--output", metavar="DIR", help="folder to assemble (default: CHECKPOINT-hub)")
    arguments = parser.parse_args()
    try:
        publish(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on: what has arrived is not sent again.")


def publish(arguments: argparse.Namespace) -> None:
    """The command. Ends with status 1 if the folder does not pass."""
    repo_id, checkpoint = arguments.repo_id, Path(arguments.checkpoint).expanduser()
    target = {"revision": arguments.revision, "create_pr": arguments.create_pr, "tag": arguments.tag}
    check_target(repo_id, **target)
    if not arguments.dry_run:
        check_token()  # before the work, not after it
    output = Path(arguments.output or checkpoint.with_name(f"{checkpoint.resolve().name}-hub")).expanduser()
    card = output / "README.md"
    ours = card.exists() and BEGIN in card.read_text(encoding="utf-8")
    print(f"Assembling {output}", file=sys.stderr)
    assemble(checkpoint, output, repo_id=repo_id, license=arguments.license, overwrite=ours)
    print("Verifying it in a fresh process, offline", file=sys.stderr)
    report = verify(output, checkpoint)
    print(report)
    if not report.ok:
        sys.exit("error: Nothing was uploaded, because the folder does not pass.")
    if arguments.dry_run:
        sizes = {name: (output / name).stat().st_size for name in report.files}
        print(f"\nWould be sent to {repo_id} ({', '.join(f'{k}={v}' for k, v in target.items() if v) or 'main'}):")
        print("\n".join(f"{size:>12,}  {report.files[name][:12]}  {name}" for name, size in sizes.items()))
        print(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files, less what the repository has already")
        return
    print(f"Uploading to {repo_id}", file=sys.stderr)
    commit = upload(output, repo_id, report=report, private=arguments.private, message=arguments.message, **target)
    print(f"Read back and equal: {commit.pr_url or commit.commit_url}")


if __name__ == "__main__":
    main()
