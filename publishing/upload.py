"""Sends a verified folder to the Hub in one commit, and reads it back."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx's or httpx2's, whichever the library uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from .verify import Report, list_files, verify

# What from_pretrained may load: where an earlier version left such a file, it must not stay among the new ones.
LOADABLE = re.compile(
    r"(adapter_|pytorch_)?model[\w.-]*\.(bin|json|safetensors)|(adapter|preprocessor)_config\.json|\w+_minimind_v\.py|"
    r"(added_tokens|special_tokens_map)\.json|chat_template\.\w+"
)


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
    code and configurations of an earlier version, which would be loaded with the new ones, are deleted in the same
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
    check_report(report, folder)
    with clear_hub_errors(repo_id):
        api = HfApi(library_name="minimind-v")
        head = open_repository(api, repo_id, private, revision)
        changed, stale = compare(api, repo_id, head, folder, report.files)
        tagged = find_tag(api, repo_id, tag) if tag else None
        if tagged and (tagged != head or changed or stale):
            raise ValueError(f"{repo_id} has a tag {tag} already, of another commit. Choose another name with --tag.")
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, str(folder / name)) for name in report.files),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=message or "Upload MiniMind-V model",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
        missing, left = compare(api, repo_id, commit.oid, folder, report.files)
        if different := missing + left:
            raise OSError(f"{repo_id} does not hold what was sent: {', '.join(different)} differ. Run it again.")
        if tag and not tagged:
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
    """Raises a PermissionError where there is none."""
    if get_token() is None:
        raise PermissionError(
            "No token of the Hub was found. Make one with write access at https://huggingface.co/settings/tokens, "
            "then run `hf auth login` or set HF_TOKEN."
        )


def check_report(report: Report, folder: Path) -> None:
    """Raises a ValueError unless the folder passed and is still what passed."""
    if not report.ok:
        raise ValueError(f"{folder} is not uploaded, because it does not pass:\n{report}")
    if names := sorted({name for name, _ in list_files(folder).items() ^ report.files.items()}):
        raise ValueError(f"{folder} has changed since it was verified: {', '.join(names)}. Verify it again.")


def open_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> str | None:
    """Makes repository and branch where there are none.

    Returns:
        The commit that the branch is at.

    Raises:
        ValueError: The repository is not one for this model.
    """
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
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision).sha


def find_tag(api: HfApi, repo_id: str, tag: str) -> str | None:
    """The commit that has the tag."""
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}.get(tag)


def compare(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    folder: Path,
    files: dict[str, str],
    repo_type: str = "model",
) -> tuple[list[str], list[str]]:
    """Files of the folder that a commit of the repository lacks or holds otherwise, and those to delete there.

    Args:
        revision: The commit.
        files: Name and SHA-256 of the folder's files.
        repo_type: `"model"` or `"space"`.
    """
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True, repo_type=repo_type)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    changed = [name for name in files if not is_same(remote.get(name), folder / name, files[name])]
    return changed, [name for name in remote if LOADABLE.fullmatch(name) and name not in files]


def is_same(remote: RepoFile | None, path: Path, sha256: str) -> bool:
    """Whether the Hub's hash of a file is that of ours."""
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
