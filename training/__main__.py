"""Command line: python -m minimind_v.training {check,train} ..."""

import sys

USAGE = """\
usage: python -m minimind_v.training COMMAND ...

  check DATA                          look at training data: counts, lengths, broken rows, which tokens carry loss
  train --model M --data D ...        train a stage; all options of transformers' TrainingArguments

examples:
  python -m minimind_v.training check pictures/
  python -m minimind_v.training train --stage sft --model checkpoints/minimind-v-emoji --data pictures/ \\
      --output-dir my-model --num-train-epochs 3 --learning-rate 1e-4
"""


def main() -> None:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    if command == "check":
        from .check import main as run
    elif command == "train":
        from .train import main as run
    else:
        sys.exit(USAGE)
    try:
        run(arguments)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
