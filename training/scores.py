"""Scores of answers against the truth: loss, exact match, chrF, BLEU, accuracy, each with a 95 % confidence interval.

BLEU and chrF are sacrebleu's, over all answers at once. Intervals of shares are Wilson's (1927), those of the other
figures percentiles of a bootstrap over rows, in which every figure is computed from the same resamples.
"""

import math
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

try:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
except ImportError as error:
    raise ImportError("Scores need the library sacrebleu: pip install 'minimind-v[evaluate]'") from error

Record = dict[str, Any]  # what is known of one answer

RESAMPLES = 1000
CONFIDENCE = 0.95
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# A letter alone or before a sign, as in "B", "(B)" and "B. A dog"; not the article of "A dog"
LETTER = re.compile(r"[\W_]*([A-D])(?![-'’]?\w|\s+\w)")
WORD = re.compile(r"[\W_]*(yes|no|是的?|否|不是)(?!\w)", re.IGNORECASE)
LONE_WORD = re.compile(WORD.pattern + r"(?!\s+\w)", re.IGNORECASE)  # not that of "No one is here"
MEANINGS = {"是": "yes", "是的": "yes", "否": "no", "不是": "no"}


def read_choice(text: str, is_truth: bool = False) -> str | None:
    """What a text begins with: a letter from A to D, or a yes or no in English or Chinese.

    Args:
        text: An answer, which after its yes or no may go on in any way, or a truth.
        is_truth: Only a yes or no that is the whole text, or that a punctuation mark follows.

    Returns:
        "A" to "D", "yes", "no", or None where it begins with something else.
    """
    if match := LETTER.match(text):
        return match[1]
    if match := (LONE_WORD if is_truth else WORD).match(text):
        return MEANINGS.get(match[1], match[1].lower())
    return None


def language_of(text: str) -> str:
    """ "zh" where there are Chinese characters, else "other"."""
    return "zh" if CHINESE.search(text) else "other"


def score_answer(answer: str, truth: str) -> Record:
    """The scores of one answer.

    Returns:
        `exact_match` (but for white space around), `correct` (None where the truth is no choice), `chrf` (0 to 100).
    """
    expected = read_choice(truth, is_truth=True)
    return {
        "exact_match": answer.strip() == truth.strip(),
        "correct": None if expected is None else read_choice(answer) == expected,
        "chrf": CHRF().sentence_score(answer, [truth]).score,
    }


def compute_figures(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """The figures of several answers.

    Args:
        records: With `answer`, `truth`, what [`score_answer`] gives, `loss` (mean over the tokens) and `tokens`.
        seed: Of the bootstrap.

    Returns:
        `rows`, and `loss` (mean over all answer tokens, in nats), `perplexity`, `exact_match` (share), `chrf`, `bleu`
        (0 to 100) and, where truths are choices, `accuracy` (share of those), each with `value`, `low` and `high`.
    """
    answers, truths = ([record[key] for record in records] for key in ("answer", "truth"))
    is_chinese = any(map(CHINESE.search, truths))
    bleu, chrf = BLEU(tokenize="zh" if is_chinese else "13a"), CHRF()
    # What is added up over the rows, from which each figure follows. sacrebleu's own bootstrap does the same, but of
    # the interval it keeps only half the width.
    losses = [[record["loss"] * record["tokens"], record["tokens"]] for record in records]
    counts = [metric._extract_corpus_statistics(answers, [truths]) for metric in (bleu, chrf)]
    table = np.concatenate([losses, *counts], axis=1, dtype=np.float64)
    end = 2 + len(counts[0][0])

    def compute(sums: np.ndarray) -> tuple[float, float, float]:
        scores = (
            bleu._compute_score_from_stats(sums[2:end].tolist()),
            chrf._compute_score_from_stats(sums[end:].tolist()),
        )
        return sums[0] / sums[1], scores[1].score, scores[0].score

    rng, shares = np.random.default_rng(seed), np.full(len(table), 1 / len(table))
    drawn = [compute(rng.multinomial(len(table), shares) @ table) for _ in range(RESAMPLES)]
    ends = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    found = np.stack([compute(table.sum(0)), *ends], axis=1).tolist()
    loss, *scores = (dict(zip(("value", "low", "high"), values, strict=True)) for values in found)
    figures: dict[str, Any] = {"rows": len(records), "loss": loss}
    figures["perplexity"] = {name: math.exp(value) for name, value in loss.items()}
    figures["exact_match"] = share([record["exact_match"] for record in records])
    figures |= dict(zip(("chrf", "bleu"), scores, strict=True))
    figures["bleu"]["signature"] = str(bleu.get_signature())
    choices = [record["correct"] for record in records if record["correct"] is not None]
    if choices:
        figures["accuracy"] = share(choices) | {"rows": len(choices)}
    return figures


def share(hits: Sequence[bool]) -> dict[str, float]:
    """How many of `hits` are true, from 0 to 1, with Wilson's interval."""
    n, z = len(hits), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    value = sum(hits) / n
    centre = (value + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
    return {"value": value, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}
