"""The Modelfile with which Ollama makes a model of GGUF files."""

import itertools
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

MODELFILE = '''\
# ollama create NAME -f Modelfile
{files}
TEMPLATE """{template}"""
PARAMETER stop "{stop}"
PARAMETER temperature 0.65
PARAMETER top_p 0.85
PARAMETER top_k 50
PARAMETER num_ctx {positions}
'''


def modelfile(files: Sequence[str], tokenizer: Any, text: PreTrainedConfig) -> str | None:
    """Content of the Modelfile; None if the chat template cannot be said in Ollama's language.

    Args:
        files: Names of the GGUF files beside it.
        tokenizer: With the checkpoint's chat template.
        text: Configuration of the decoder.
    """
    template = go_template(tokenizer)
    return template and MODELFILE.format(
        files="\n".join(f"FROM ./{file}" for file in files),
        template=template,
        stop=tokenizer.eos_token,
        positions=min(text.max_position_embeddings, 8192),
    )


def go_template(tokenizer: Any) -> str | None:
    """The chat template in the language of Go, read off chats: what it writes around a message of each role.

    None if turns do not follow each other unchanged, as those of every release do.
    """
    chat = [{"role": role, "content": "{{ .Content }}"} for role in ("system", "user", "assistant")]
    chats = ["", *(render(tokenizer, chat[:end]) for end in (1, 2, 3))]
    asked, unguided = render(tokenizer, chat[:2], add_generation_prompt=True), render(tokenizer, chat[1:2])
    system, user, assistant = (after[len(before) :] for before, after in itertools.pairwise(chats))
    follows = all(after.startswith(before) for before, after in [*itertools.pairwise(chats), (chats[2], asked)])
    if not follows or not unguided.endswith(user):
        return None
    default = unguided.removesuffix(user)  # what stands there without a system message
    default = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else ""
    turns = {"system": system, "user": user, "assistant": assistant}
    turn = "".join(f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}' for role, text in turns.items())
    return f"{default}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{asked.removeprefix(chats[2])}"


def render(tokenizer: Any, chat: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, **options)
