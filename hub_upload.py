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
import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
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

from hub_checks import CODE, GREEDY, PROMPT, TRANSFORMERS_RANGE, Check, pictures_of, read_json

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- written by hub_upload.py: begin -->", "<!-- written by hub_upload.py: end -->"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What from_pretrained may load: where an earlier version left such a file, it must not stay beside the new ones.
LOADABLE = re.compile(
    r"(adapter_|pytorch_)?model[\w.-]*\.(bin|json|safetensors)|(adapter|preprocessor)_config\.json|\w+_minimind_v\.py|"
    r"(added_tokens|special_tokens_map)\.json|chat_template\.\w+"
)
# What Trainer writes of a run, by its own names
TRAINING_FACTS = ("global_step", "epoch", "train_batch_size", "rows_left_out", "train_loss", "train_runtime")


@dataclass
class Report:
    """What [`verify`] found; `str()` of it is the text that the command prints.

    `files` are the names and SHA-256 of what was verified: [`upload`] sends nothing else.
    """

    folder: str
    files: dict[str, str]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16} {check.detail}" for check in self.checks]
        passed = sum(check.ok for check in self.checks)
        return "\n".join([*lines, f"{passed} of {len(self.checks)} checks passed: {self.folder}"])


# --- Assemble --------------------------------------------------------------------------------------------------------


def assemble(checkpoint: str | Path, output: str | Path, *, repo_id: str, license: str | None = None) -> Path:
    """Writes all that the repository will hold into a folder, which appears only when it is complete.

    The weights are copied byte for byte; configuration, processor and tokenizer are written anew, with the code of
    this package. A card (`README.md`) of the checkpoint stays: its metadata win, its text stands first, and its
    sections take the place of those with the same heading.

    Args:
        checkpoint: Folder written by `save_pretrained`, `Trainer`, or this package's commands.
        output: Folder to write; one that was assembled before is replaced.
        repo_id: `USER/REPO`, for the commands in the card.
        license: Licence of the weights, as the Hub calls it; left out, the card's, else `"apache-2.0"`.

    Returns:
        The output folder.

    Raises:
        FileNotFoundError: No such folder, no weights in safetensors, or no processor.
        FileExistsError: The output exists, is not empty, and was not assembled.
        ValueError: Not a vision-language checkpoint of this package, or its files are broken.
        OSError: The disk is full, or the output cannot be written.
    """
    checkpoint, output = Path(checkpoint).expanduser(), Path(output).expanduser()
    check_checkpoint(checkpoint)
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"The output {output} holds the checkpoint. Choose another folder with --output.")
    card = output / "README.md"
    assembled = card.is_file() and BEGIN in card.read_text(encoding="utf-8")
    if output.exists() and not assembled and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and was not assembled here. Choose another folder with --output.")
    # Imported here, so that --help and uploading do not wait for torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    import minimind_v
    from minimind_v.common import atomic_output

    code = Path(minimind_v.__file__).parent  # what is published is what runs here
    weights = [path for path in checkpoint.iterdir() if WEIGHTS.fullmatch(path.name)]
    with clear_disk_errors(output), atomic_output(output, overwrite=True) as folder:
        needed, free = sum(path.stat().st_size for path in weights), shutil.disk_usage(output.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        try:
            config, processor = (cls.from_pretrained(checkpoint) for cls in (AutoConfig, AutoProcessor))
            model, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
        except Exception as error:  # broken files make the readers fail in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{checkpoint} cannot be loaded: {reason} Save it again.") from error
        if problems := {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}:
            raise ValueError(f"The weights of {checkpoint} do not fit its configuration: {problems}. Save it again.")
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in (*weights, *(code / name for name in CODE), HERE / "LICENSE"):
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(HERE / "examples" / "images" / "apple.png", folder / "example.png")
        captioner = pipeline("image-to-text", model=model, processor=processor, device="cpu")
        caption = captioner(str(folder / "example.png"), prompt=PROMPT, generate_kwargs=dict(GREEDY))[0][
            "generated_text"
        ]
        card = write_card(checkpoint, model, repo_id, license, caption)
        card.save(folder / "README.md")
        for name in pictures_of(card.text) - {"example.png"}:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, folder / name)
    return output


def check_checkpoint(checkpoint: Path) -> None:
    """Raises unless the folder has what a vision-language checkpoint of this package has."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder. Name the folder of a checkpoint.")
    names = {path.name for path in checkpoint.iterdir()}
    if "adapter_config.json" in names:
        raise ValueError(
            f"{checkpoint} holds a LoRA adapter, which does not load by itself. Merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
        )
    kind = read_json(checkpoint / "config.json").get("model_type")
    if kind != "minimind_v":
        raise ValueError(
            f"{checkpoint} is not a vision-language checkpoint of this package: its config.json must say model_type "
            f"'minimind_v'; it says {kind!r}. (python -m minimind_v.conversion makes one of the original's weights.)"
        )
    if not any(WEIGHTS.fullmatch(name) for name in names):
        raise FileNotFoundError(f"{checkpoint} has no model.safetensors. Save the model with save_pretrained.")
    if "tokenizer.json" not in names or not names & {"processor_config.json", "preprocessor_config.json"}:
        raise FileNotFoundError(
            f"{checkpoint} has no processor (tokenizer.json and processor_config.json). Save the one that the model "
            f"was trained with beside it: processor.save_pretrained({str(checkpoint)!r})."
        )


@contextlib.contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """One clear OSError where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        advice = "Free some space, or choose another disk with --output."
        raise OSError(error.errno, f"No room to write {output} ({error.strerror}). {advice}") from error


# --- Model card ------------------------------------------------------------------------------------------------------


def write_card(checkpoint: Path, model: Any, repo_id: str, license: str | None, caption: str) -> ModelCard:
    """The card of the checkpoint, if it has one, with all that it does not say itself."""
    from minimind_v import __version__
    from minimind_v.common import count_parameters

    own_data, own_text = {}, ""
    if (checkpoint / "README.md").exists():
        try:
            own = ModelCard.load(checkpoint / "README.md")
        except Exception as error:  # YAML has many errors
            raise ValueError(f"The metadata of {checkpoint / 'README.md'} cannot be read: {error}") from error
        own_data = own.data.to_dict()
        own_text = re.sub(rf"{BEGIN}.*?{END}", "", own.text.replace("\r\n", "\n"), flags=re.DOTALL).strip()
    name = repo_id.split("/")[-1]
    defaults = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    defaults |= {"license": "apache-2.0", "language": ["en", "zh"]}
    if results := evaluation(checkpoint):
        defaults |= {"eval_results": results, "model_name": name}
    data = ModelCardData(**defaults | own_data)
    data.license = license or data.license
    data.tags = list(dict.fromkeys([*(data.tags or []), "image-to-text", "minimind_v", "vision-language-model"]))
    data.widget = [{"src": "example.png", "text": PROMPT, "output": {"text": caption}}]
    counts = count_parameters(model)
    card = ModelCard.from_template(
        data,
        template_path=str(HERE / "hub_card_template.md"),
        title=name,
        repo_id=repo_id,
        prompt=PROMPT,
        caption=caption,
        config=model.config,
        text=model.config.text_config,
        vision=model.config.vision_config,
        counts=counts,
        total=sum(count for part, count in counts.items() if part != "active"),
        millions=lambda count: f"{count / 1e6:.2f}M",
        version=__version__,
        transformers_range=TRANSFORMERS_RANGE,
        training=training_facts(checkpoint),
        results=data.eval_results,
    )
    title, *sections = re.split(r"^(?=## )", card.text.strip() + "\n", flags=re.MULTILINE)
    if own_text:  # its title stays, and its sections stand for those with the same heading
        taken = {heading.strip().lower() for heading in re.findall(r"^## +(.+)$", own_text, flags=re.MULTILINE)}
        sections = [text for text in sections if text[3:].split("\n")[0].lower() not in taken]
        title, own_text = "", own_text + "\n\n"
    card.text = f"\n{own_text}{BEGIN}\n{title}{''.join(sections)}{END}\n"
    return card


def training_facts(checkpoint: Path) -> dict[str, Any]:
    """What the files of the training run say; {} where there are none."""
    found = read_json(checkpoint / "trainer_state.json") | read_json(checkpoint / "all_results.json")
    facts = {name: found[name] for name in TRAINING_FACTS if found.get(name) is not None}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in facts.items()}


def evaluation(checkpoint: Path) -> list[EvalResult]:
    """The metrics of the training run on its held-out data, without its timings."""
    task = {"task_type": "image-text-to-text", "dataset_type": "held-out", "dataset_name": "held-out data of the run"}
    return [
        EvalResult(**task, metric_type=name.removeprefix("eval_"), metric_value=value)
        for name, value in read_json(checkpoint / "all_results.json").items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second")) and isinstance(value, float)
    ]


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
        # Nothing of the user's: no token, no caches, no settings
        theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        environment |= {"HF_HOME": f"{elsewhere}/home", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        result = Path(elsewhere, "checks.json")
        command = [sys.executable, HERE / "hub_checks.py", folder.resolve(), result]
        command += [Path(checkpoint).expanduser().resolve()] if checkpoint else []
        process = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, encoding="utf-8")
        report.checks = [Check(**check) for check in read_json(result) or []]
        if process.returncode:
            reason = (process.stderr.strip() or "no message").splitlines()[-1]
            report.checks.append(Check("fresh process", False, f"ended with status {process.returncode}: {reason}"))
    return report


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

    Files that the repository has already are not sent again, and where nothing changed there is no commit. Weights,
    code and configurations of an earlier version, which would be loaded beside the new ones, are deleted in the same
    commit; other files of the repository stay. After an interruption the same call goes on.

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
        stale = [name for name in list_remote(api, repo_id, head) if LOADABLE.fullmatch(name) and name not in files]
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
        _owner, _name = repo_id.split("/")
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository. Give it as USER/REPO.") from error
    if create_pr and (tag or revision not in (None, "main")):
        raise ValueError("A pull request goes to main and has no tag yet: leave out --revision and --tag.")


def check_token() -> None:
    if get_token() is None:
        raise PermissionError(
            "No token of the Hub was found. Make one with write access at https://huggingface.co/settings/tokens, "
            "then run `hf auth login` or set HF_TOKEN."
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
                f"The Hub does not let this token write to {repo_id} ({status}: {said}). Check the name, log in with "
                "a token that has write access to it (`hf auth login`), or propose the change with --create-pr."
            ) from error
        raise OSError(f"The Hub refused ({status}: {said}). Run the same command again in a while.") from error


# --- Command ---------------------------------------------------------------------------------------------------------


def main() -> None:
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
    print(f"Assembling {output}", file=sys.stderr)
    assemble(checkpoint, output, repo_id=repo_id, license=arguments.license)
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
