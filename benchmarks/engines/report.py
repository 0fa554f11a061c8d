"""What the scripts beside this file write."""

import json
import resource
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """The most memory, in bytes, that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before this process was started
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def write_report(
    file: str | Path, runtime: str, load_seconds: float, answers: list[dict[str, Any]], memory: int | None = None
) -> None:
    """Writes what `asking.ask` reads.

    Args:
        file: To write.
        runtime: Its name and version.
        load_seconds: Until it could be asked.
        answers: One for each question, in their order.
        memory: The most, in bytes; left out, of this process.
    """
    report = {"runtime": runtime, "load_seconds": load_seconds, "peak_memory_bytes": memory or peak_memory()}
    text = json.dumps(report | {"answers": answers}, ensure_ascii=False, indent=1)
    Path(file).write_text(text + "\n", encoding="utf-8")
