"""Publishes a checkpoint of this package on the Hub: assemble, verify, upload. Nothing is sent that was not loaded.

    python hub_upload.py my-model USER/REPO --dry-run  # the same as: minimind-v upload my-model USER/REPO --dry-run

1. [`assemble`] writes everything that the repository will hold into a folder: weights, configuration, processor, code,
   licence and model card.
2. [`verify`] loads that folder as a stranger would: in a fresh process, offline, with empty caches and without this
   package.
3. [`upload`] sends what was verified, in one commit, and reads it back.

The network is used by `upload` only. The token is the one of `hf auth login` or HF_TOKEN; it is never printed.
"""

import sys

from minimind_v_cli.__main__ import main as run_command

__all__ = ["Report", "assemble", "main", "upload", "verify"]


def main(argv: list[str] | None = None) -> None:
    """Runs `minimind-v upload`.

    Args:
        argv: The command line after its name; left out, that of this process.
    """
    run_command(["upload", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
else:  # not for the command, whose --help need not wait for torch
    from minimind_v.publishing import Report, assemble, upload, verify
