"""Does llama.cpp answer from GGUF files as the checkpoint does?"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common import load_processor
from .verification import MAX_NEW_TOKENS, Question, compare_answers


def check_with_llama_cpp(checkpoint: str | Path, files: Sequence[Path], positions: int, is_exact: bool) -> str:
    """Asks both, if llama-cpp-python is installed.

    llama.cpp gets images in the tower's size, so that its own resizing does not decide.

    Args:
        checkpoint: Folder of this package.
        files: The GGUF files: of the decoder, and where there is one of the tower.
        positions: Of the decoder.
        is_exact: They are float32.

    Returns:
        How many answers are the same, or how to install what is missing, for the summary.

    Raises:
        AnswersDifferError: They are not all the same, and `is_exact`.
    """
    try:
        from llama_cpp import GGML_TYPE_F32, Llama
        from llama_cpp._logger import llama_log_callback
        from llama_cpp.llama_chat_format import MTMDChatHandler
        from llama_cpp.mtmd_cpp import mtmd_helper_log_set
    except ImportError:
        return "no: for that, pip install llama-cpp-python (0.3.36 is known to work)"
    has_tower = len(files) > 1
    mtmd_helper_log_set(llama_log_callback, None)  # quiet, as the rest of llama-cpp-python is
    engine = Llama(
        str(files[0]),
        chat_handler=MTMDChatHandler(str(files[1]), verbose=False) if has_tower else None,
        n_ctx=min(positions, 1024),
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    pixels = load_processor(checkpoint).image_processor if has_tower else None
    try:
        checked = compare_answers(checkpoint, lambda question: ask(engine, question, pixels), is_exact, has_tower)
    finally:
        engine.close()
    return checked + ", by llama.cpp"


def ask(engine: Any, question: Question, pixels: Any) -> list[int]:
    """Ids of llama.cpp's greedy answer."""
    content: Any = question.text
    if question.image is not None:
        image = question.inputs["pixel_values"][0].permute(1, 2, 0).numpy()
        image = (image * np.array(pixels.image_std) + np.array(pixels.image_mean)) * 255
        file = io.BytesIO()
        Image.fromarray(image.round().astype(np.uint8)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    # The last token is chosen, but not computed with: so one more than is compared.
    reply = engine.create_chat_completion(
        [{"role": "user", "content": content}], max_tokens=MAX_NEW_TOKENS + 1, temperature=0, repeat_penalty=1
    )
    answer = engine.input_ids[reply["usage"]["prompt_tokens"] : engine.n_tokens].tolist()
    return answer[:MAX_NEW_TOKENS]
