"""`python -m jaxtune.serve.checks.looking`: a file looked at in a process of its own, which the API can end.

One JSON object on standard input says what is asked for; one on standard output is the answer, or `{"error": …}`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.data import encode, templates
from jaxtune.data.formats import chat
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from jaxtune.serve.checks import checking, lines, validation
from jaxtune.serve.settings import Limits

_CHARACTERS = 8000  # of one example that is shown


def report(path: Path, model: Path, limits: Limits, max_length: int) -> dict[str, Any]:
    """What a training file is, as `validation.inspect` finds it, and why a job would not take it.

    Raises:
      UserError: the model's tokenizer cannot be read.
    """
    found = validation.inspect(path, model, limits, max_length, "training_file")
    failure = found.failure()
    said = None if failure is None else {"code": failure[0], "message": failure[1], "param": failure[2]}
    return {**found.to_dict(), "failure": said}


def preview(path: Path, model: Path, limits: Limits, max_length: int, n: int) -> list[list[tuple[str, bool]]]:
    """The first examples as the model reads them: runs of text, each with whether it is trained on.

    Raises:
      UserError: the model's tokenizer cannot be read.
    """
    words, out = tokenizer.load(model), []
    for made in _examples(path, limits):
        try:
            template, _ = templates.choose("auto", getattr(words, "chat_template", None), made.format)
            pieces = encode.encode(made, words, encode.Settings(template, room=max_length)).pieces
        except UserError:
            continue  # the report says what is wrong with it
        out += [_short(encode.visible(words, p.ids, p.mask)) for p in pieces]
        if len(out) >= n:
            break
    return out[:n]


def _examples(path: Path, limits: Limits) -> Iterator[Any]:
    """Those lines that are good."""
    with path.open("rb") as f:
        for number, row in lines.objects(f, limits):
            format = None if isinstance(row, lines.Finding) else checking.format_of(row)
            if format is None or isinstance(row, lines.Finding) or any(checking.findings(row, format, number)):
                continue
            if format == checking.CHAT:
                yield chat.messages(row, str(number), {})
            elif format == checking.COMPLETION:
                yield chat.prompt_completion(row, str(number), {})


def _short(runs: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    out: list[tuple[str, bool]] = []
    room = _CHARACTERS
    for text, trained in runs:
        if room <= 0:
            return [*out, ("…", False)]
        out.append((text[:room], trained))
        room -= len(text)
    return out


def main() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    path, model, limits = Path(asked["path"]), Path(asked["model"]), Limits.model_validate(asked["limits"])
    try:
        if asked["what"] == "report":
            answer: Any = report(path, model, limits, asked["max_length"])
        else:
            answer = preview(path, model, limits, asked["max_length"], asked["n"])
    except UserError as e:
        answer = {"error": str(e)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
