"""The folder that a training writes into: what may be there before, and the checkpoints in it."""

import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerState

from .arguments import TrainArguments


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run and their steps, in the order of the steps, not of their times."""
    paths = Path(folder).glob("checkpoint-*")
    return sorted((int(step), path) for path in paths if (step := path.name.split("-")[1]).isdigit())


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint of a run; the library's function also takes one whose writing was cut off."""
    for _, path in reversed(list_checkpoints(folder)):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))  # written last
            return str(path)
        except (OSError, ValueError):
            continue
    return None


def check_output_folder(arguments: TrainArguments) -> None:
    """Makes sure that a training is the only one in its `output_dir`, and finds the checkpoint to go on from.

    Raises:
        FileExistsError: The folder is not empty, and is neither to be overwritten nor to be gone on from.
        FileNotFoundError: There is no checkpoint to go on from.
        ValueError: To overwrite the folder would delete what the training reads.
    """
    folder, resume = Path(arguments.output_dir), arguments.resume_from_checkpoint
    is_empty = not folder.exists() or not any(folder.iterdir())
    if resume in ("True", "true", "latest"):
        arguments.resume_from_checkpoint = last_checkpoint(folder)
        if arguments.resume_from_checkpoint is None:
            raise FileNotFoundError(
                f"{folder} has no complete checkpoint to go on from. Start without --resume-from-checkpoint."
            )
    elif arguments.overwrite:
        read = (arguments.model, arguments.data, arguments.eval_data, arguments.cache_image_features, Path.cwd())
        for path in map(Path, filter(None, read)):
            if path.exists() and path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"--overwrite would delete {path}, because it is in --output-dir {folder}.")
    elif not is_empty and not (resume and Path(resume).resolve().parent == folder.resolve()):
        raise FileExistsError(
            f"{folder} is not empty, and two trainings in one folder would mix. Choose another --output-dir, delete "
            "what is there with --overwrite, or go on with it with --resume-from-checkpoint latest."
        )
    elif resume and not Path(resume, "trainer_state.json").is_file():
        raise FileNotFoundError(f"{resume} is no checkpoint of a training: it has no trainer_state.json.")
    PartialState().wait_for_everyone()  # before one of them writes there


def clear_output_folder(arguments: TrainArguments) -> None:
    """With `overwrite`, deletes what `output_dir` holds."""
    if arguments.overwrite and arguments.process_index == 0:
        for path in Path(arguments.output_dir).glob("*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    PartialState().wait_for_everyone()
