"""The model card: what the checkpoint's own card says, and around it what its files and one real answer say."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import MiniMindVForConditionalGeneration, __version__
from ..common import count_parameters, read_json
from .checks import PROMPT, supported_transformers

TEMPLATE = Path(__file__).with_name("card_template.md")
# What was written here, between the lines of the user: an update replaces it
BEGIN, END = "<!-- written by hub_upload.py: begin -->", "<!-- written by hub_upload.py: end -->"
# What Trainer writes of a run, by its own names
TRAINING_FACTS = ("global_step", "epoch", "train_batch_size", "rows_left_out", "train_loss", "train_runtime")


def write_card(
    checkpoint: Path, model: MiniMindVForConditionalGeneration, repo_id: str, license: str | None, caption: str
) -> ModelCard:
    """The card of the checkpoint, if it has one, with all that it does not say itself."""
    own_data, own_text = read_own_card(checkpoint / "README.md")
    state, results = (
        read_json(path) if path.exists() else {}
        for path in (checkpoint / "trainer_state.json", checkpoint / "all_results.json")
    )
    name, counts = repo_id.split("/")[-1], count_parameters(model)
    data = card_data(own_data, name, license, evaluation(results), caption)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        repo_id=repo_id,
        prompt=PROMPT,
        caption=caption,
        config=model.config,
        text=model.config.text_config,
        vision=model.config.vision_config,
        counts=counts,
        total=sum(count for part, count in counts.items() if part != "active"),
        millions=lambda count: f"{count / 1e6:.2f}M",
        version=__version__,
        transformers_range=supported_transformers(),
        training=training_facts(state | results),
        results=data.eval_results,
    )
    card.text = merge(own_text, card.text)
    return card


def read_own_card(path: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of the user's card, without what was written here before; empty where there is none."""
    if not path.exists():
        return {}, ""
    try:
        card = ModelCard.load(path)
    except Exception as error:  # YAML has many errors
        raise ValueError(f"The metadata of {path} cannot be read: {error}") from error
    text = card.text.replace("\r\n", "\n")
    return card.data.to_dict(), re.sub(rf"{BEGIN}.*?{END}", "", text, flags=re.DOTALL).strip()


def card_data(
    own: dict[str, Any], name: str, license: str | None, results: list[EvalResult], caption: str
) -> ModelCardData:
    """Metadata for the Hub: `own` where it says something, and always our tags and the example."""
    defaults: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    defaults |= {"license": "apache-2.0", "language": ["en", "zh"]}
    if results:
        defaults |= {"eval_results": results, "model_name": name}
    data = ModelCardData(**defaults | own)
    data.license = license or data.license
    tags = [*(data.tags or []), "image-to-text", "minimind_v", "vision-language-model"]
    data.tags = list(dict.fromkeys(tags))
    data["widget"] = [{"src": "example.png", "text": PROMPT, "output": {"text": caption}}]
    return data


def merge(own: str, written: str) -> str:
    """The user's text first; of the `written` one, the sections whose headings it does not have."""
    title, *sections = re.split(r"^(?=## )", written.strip() + "\n", flags=re.MULTILINE)
    if own:
        taken = {heading.strip().lower() for heading in re.findall(r"^## +(.+)$", own, flags=re.MULTILINE)}
        sections = [text for text in sections if text[3:].split("\n")[0].lower() not in taken]
        title, own = "", own + "\n\n"
    return f"\n{own}{BEGIN}\n{title}{''.join(sections)}{END}\n"


def training_facts(found: dict[str, Any]) -> dict[str, Any]:
    """The facts of the training run that its files state."""
    facts = {name: found[name] for name in TRAINING_FACTS if found.get(name) is not None}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in facts.items()}


def evaluation(results: dict[str, Any]) -> list[EvalResult]:
    """The metrics of the training run on its held-out data, without its timings."""
    task: dict[str, Any] = {"task_type": "image-text-to-text", "dataset_type": "held-out"}
    task["dataset_name"] = "held-out data of the run"
    return [
        EvalResult(**task, metric_type=name.removeprefix("eval_"), metric_value=value)
        for name, value in results.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second")) and isinstance(value, float)
    ]
