"""The three steps in a row, as the command `minimind-v upload` runs them."""

import os
import sys
from pathlib import Path

from .assemble import assemble
from .upload import check_target, check_token, upload
from .verify import Report, verify


def publish(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    output: str | Path | None = None,
) -> bool:
    """Assembles a folder, verifies it, and uploads it if it passed. Prints the report and what was sent.

    Args:
        checkpoint: Folder of a checkpoint.
        repo_id: `USER/REPO`.
        private, revision, create_pr, tag, message: As [`upload`] takes them.
        license: As [`assemble`] takes it.
        dry_run: Do all but the network, and print what would be sent.
        output: Folder to assemble; left out, the checkpoint's name with `-hub` at its end.

    Returns:
        Whether the folder passed; if not, nothing was sent.

    Raises:
        OSError, ValueError: As [`assemble`], [`verify`] and [`upload`] raise them.
    """
    check_target(repo_id, revision, create_pr, tag)
    if not dry_run:
        check_token()  # before the work, not after it
    checkpoint = Path(checkpoint).expanduser()
    output = Path(output or f"{os.path.abspath(checkpoint)}-hub").expanduser()
    print(f"Assembling {output}", file=sys.stderr)
    assemble(checkpoint, output, repo_id=repo_id, license=license)
    print("Verifying it in a fresh process, offline", file=sys.stderr)
    report = verify(output, checkpoint)
    print(report)
    if not report.ok:
        print("error: Nothing was uploaded, because the folder does not pass.", file=sys.stderr)
        return False
    target = {"revision": revision, "create_pr": create_pr, "tag": tag}
    if dry_run:
        print_plan(report, output, f"{repo_id} ({', '.join(f'{k}={v}' for k, v in target.items() if v) or 'main'})")
        return True
    print(f"Uploading to {repo_id}", file=sys.stderr)
    commit = upload(output, repo_id, report=report, private=private, message=message, **target)
    print(f"Read back and equal: {commit.pr_url or commit.commit_url}")
    return True


def print_plan(report: Report, folder: Path, target: str) -> None:
    """What an upload would send: bytes, beginning of the SHA-256, and name of each file."""
    sizes = {name: (folder / name).stat().st_size for name in report.files}
    print(f"\nWould be sent to {target}:")
    print("\n".join(f"{size:>12,}  {report.files[name][:12]}  {name}" for name, size in sizes.items()))
    print(f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files, less what the repository has already")
