"""What every export returns, and the command prints."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Summary:
    """What an export wrote and checked; `str()` of it is the text that the command prints.

    Args:
        output: The file or folder that was written.
        form: What it is, and for which program.
        precision: Of its weights.
        checked: What was compared with the checkpoint, or why nothing was.
        notes: What was left out or has to be known, a sentence each.
    """

    output: Path
    form: str
    precision: str
    checked: str
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        folder = self.output.parent if self.output.is_file() else self.output
        files = [self.output] if self.output.is_file() else sorted(p for p in self.output.rglob("*") if p.is_file())
        lines = [
            f"Form         {self.form}",
            f"Precision    {self.precision}",
            *(f"File         {file.relative_to(folder)}, {megabytes(file)}" for file in files),
            f"Checked      {self.checked}",
            *(f"Note         {note}" for note in self.notes),
            f"Written to   {self.output}",
        ]
        return "\n".join(lines)


def megabytes(file: Path) -> str:
    """Size of a file, for people."""
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size > 50_000 else f"{size / 1e3:.1f} kB"
