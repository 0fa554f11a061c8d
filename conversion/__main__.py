"""Command line: python -m minimind_v.conversion CHECKPOINT OUTPUT ..."""

import argparse
import sys

import torch

from .convert import Summary, convert_checkpoint
from .key_maps import GENERATIONS

EXAMPLES = """\
examples:
  MiniMind-3V, weights only (the tower and the tokenizer come from the original's model folder):
    python -m minimind_v.conversion sft_vlm_768.pth minimind-3v \\
        --vision-encoder siglip2-base-p32-256-ve --tokenizer minimind-v/model
  a folder in the original's transformers format:
    python -m minimind_v.conversion MiniMind-3V minimind-3v --vision-encoder siglip2-base-p32-256-ve
  MiniMind2-V (26M), early or late:
    python -m minimind_v.conversion sft_vlm_512.pth minimind2-v \\
        --vision-encoder clip-vit-base-patch16 --tokenizer minimind-v/model
  a text-only MiniMind, to begin training a vision-language model:
    python -m minimind_v.conversion llm_768.pth start --vision-encoder siglip2-base-p32-256-ve --tokenizer model
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minimind_v.conversion",
        description="Turn a checkpoint of the original MiniMind-V into one that transformers loads, exactly.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help=".pth file, or folder or Hub repository of the original")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--vision-encoder", metavar="PATH_OR_REPO", help="CLIP or SigLIP tower, if the file has none")
    parser.add_argument("--tokenizer", metavar="PATH_OR_REPO", help="folder with the original's tokenizer.json")
    parser.add_argument(
        "--config", dest="original_config", metavar="JSON", help="the original constructor's arguments; else released"
    )
    parser.add_argument("--generation", choices=GENERATIONS, help="recognised from the tensors if left out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="kept as it is if left out")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    arguments["dtype"] = getattr(torch, arguments["dtype"]) if arguments["dtype"] else None
    summary = Summary()
    try:
        convert_checkpoint(arguments.pop("checkpoint"), output, **arguments, summary=summary)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(summary)
    print(f"Written to   {output}")


if __name__ == "__main__":
    main()
