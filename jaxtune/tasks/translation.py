"""Translation of a text.

    {"source": "A man is sleeping.", "target": "Ein Mann schläft."}
    {"en": "A man is sleeping.", "de": "Ein Mann schläft."}   (data.columns: {source: en, target: de})

A target column that is named by a language's code names the language in the prompt, and decides the tokenisation.
"""

from collections.abc import Sequence

from jaxtune.metrics import translation
from jaxtune.metrics.base import Scores
from jaxtune.tasks.base import Options, Row, Task, as_list, wanted

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def _ask(row: Row, options: Options) -> str:
    into = LANGUAGES.get((options.language or "").split("-")[0])
    return f"Translate{f' into {into}' if into else ''}: {row['source']}\nTranslation:\n"


def score(predictions: Sequence[str], references: Sequence[str | list[str]], options: Options) -> Scores:
    """BLEU, chrF and TER."""
    return translation.score([p.strip() for p in predictions], references, options.language)


def copy(rows: Sequence[Row], references: Sequence[str | list[str]], options: Options) -> tuple[str, Scores]:
    """The source text as it is."""
    return "the source, copied", score([row["source"] for row in rows], references, options)


TASK = Task(
    name="translation",
    format="translation",
    ask=_ask,
    answer=lambda row, origin: as_list(wanted(row, "target", origin))[0],
    reference=lambda row: row.get("target"),
    score=score,
    metric="bleu",
    max_new_tokens=128,
    baseline=copy,
)
