"""What an evaluation leaves for people and for the Hub: a page with the worst answers, and entries of a model card."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment

from .check import HTML_ROWS, thumbnail_url
from .data import images_of
from .scores import Record

METRICS = ("loss", "perplexity", "exact_match", "accuracy", "chrf", "bleu")
TEMPLATE = Path(__file__).with_suffix(".html")


def list_figures(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of all rows and of each group, by a title; columns with a single value say nothing new."""
    groups = {column: values for column, values in results["by"].items() if len(values) > 1}
    titles = {f"{column} {value}": figures for column, values in groups.items() for value, figures in values.items()}
    return {"all": results["all"]} | titles


def describe_figure(name: str, figure: dict[str, Any]) -> str:
    """A figure and its interval, such as "87.5 % [52.9, 97.8]"."""
    is_share = name in ("exact_match", "accuracy")
    value, low, high = (f"{figure[key] * (100 if is_share else 1):.4g}" for key in ("value", "low", "high"))
    return f"{value}{' %' if is_share else ''} [{low}, {high}]"


def render_report(results: dict[str, Any], records: list[Record], rows: Any, processor: Any) -> str:
    """HTML page of the figures and the worst answers, complete in itself."""
    worst = sorted(records, key=lambda r: (r["exact_match"] or bool(r["correct"]), r["chrf"], -r["loss"]))[:HTML_ROWS]

    def thumbnails(record: Record) -> list[str]:
        number = record["row"]
        images = images_of(rows[number]["messages"])
        return [thumbnail_url(image, f"an image of row {number}", processor.max_image_pixels) for image in images]

    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    figures = list_figures(results)
    return template.render(
        results=results, figures=figures, metrics=METRICS, shown=describe_figure, worst=worst, thumbnails=thumbnails
    )


def list_results(results: dict[str, Any]) -> list[EvalResult]:
    """The figures as the Hub's metadata has them (`model-index`)."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=results["data"],
            dataset_name=results["data"] if title == "all" else f"{results['data']}, {title}",
            dataset_config=None if title == "all" else title,
            metric_type=name,
            metric_value=round(figures[name]["value"], 4),
        )
        for title, figures in list_figures(results).items()
        for name in METRICS
        if name in figures
    ]


def update_card(folder: Path, entries: list[EvalResult]) -> None:
    """Puts results into the metadata of the README.md of a model, in the place of earlier ones of the same data."""
    path, name = folder / "README.md", folder.resolve().name
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {name}\n")
    evaluated = {entry.dataset_type for entry in entries}
    data: Any = card.data
    kept = [entry for entry in data.eval_results or () if entry.dataset_type not in evaluated]
    data.eval_results, data.model_name = [*kept, *entries], data.model_name or name
    card.save(path)
