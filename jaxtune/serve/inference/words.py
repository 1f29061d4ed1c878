"""New tokens as text: as it comes, up to a stop string, never half a character; and each token by itself."""

import re
from collections.abc import Sequence
from typing import Any

from jaxtune.generate import held_back
from jaxtune.serve.inference.asks import Word

_BEFORE = 8  # tokens of the prompt that new ones are decoded with: some tokenizers drop a space at the start of a text
_LEAST = -9999.0  # what OpenAI writes for a log-probability of nothing


class Text:
    """A text whose tokens come one after another."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = (), specials: bool = False) -> None:
        self.tokenizer, self.stop, self.specials = tokenizer, stop, specials
        self.ids = list(prompt[-_BEFORE:])
        self.anchor, self.read = 0, len(self.ids)  # from where is decoded, and up to where the text is known
        self.text, self.told = "", 0
        self.stopped = False
        self.half = ""  # what is decoded of a character that has not come wholly

    def push(self, id: int) -> None:
        """The next token. After a stop string nothing more is to come."""
        self.ids.append(id)
        before, whole = self._decoded(self.read), self._decoded(len(self.ids))
        new = whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(self.ids[self.read :])
        if new.endswith("\ufffd"):
            self.half = new
            return
        self._add(new)
        self.half, self.anchor, self.read = "", self.read, len(self.ids)

    def end(self) -> None:
        """No more tokens come: half a character is told as what it is."""
        if not self.stopped:
            self._add(self.half)
            self.half = ""

    def sure(self, ended: bool) -> int:
        """How much of the text may be told: what cannot become a stop string."""
        return len(self.text) if ended or self.stopped else len(self.text) - held_back(self.text, self.stop)

    def _add(self, new: str) -> None:
        known = len(self.text)
        self.text += new
        found = (self.text.find(s, max(0, known - len(s) + 1)) for s in self.stop)
        if (cuts := [at for at in found if at >= 0]) and not self.stopped:
            self.text, self.stopped = self.text[: min(cuts)], True

    def _decoded(self, until: int) -> str:
        return self.tokenizer.decode(self.ids[self.anchor : until], skip_special_tokens=not self.specials)


class Speller:
    """Single tokens of a tokenizer as text and as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, id: int) -> tuple[str, list[int]]:
        """Its text, and its bytes, which may be a part of a character."""
        if id not in self.known:
            text = self.tokenizer.decode([id])
            raw = text.encode()
            piece = self.tokenizer.convert_ids_to_tokens(id) or ""
            if "\ufffd" in text:
                raw = _bytes(piece) or raw
            elif piece.startswith("▁") and not text.startswith(" "):  # SentencePiece drops it from a lone token
                text = f" {text}"
                raw = text.encode()
            self.known[id] = text, list(raw)
        return self.known[id]

    def word(self, id: int, logprob: float | None, top: Sequence[tuple[int, float]], at: int) -> Word:
        """A token as the API tells it, which begins at a character of its text."""
        best = [(*self(i), max(p, _LEAST)) for i, p in top]
        return Word(*self(id), None if logprob is None else max(logprob, _LEAST), best, at)


def _byte_level() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (Radford et al., 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level()


def _bytes(piece: str) -> bytes | None:
    """The bytes of a token that is a part of a character.

    >>> _bytes("<0xE2>"), _bytes("Ġé")
    (b'\\xe2', b' \\xe9')
    """
    if (one := re.fullmatch(r"<0x([0-9A-F]{2})>", piece)) is not None:
        return bytes.fromhex(one[1])
    if piece and all(c in _BYTE_LEVEL for c in piece):
        return bytes(_BYTE_LEVEL[c] for c in piece)
    return None
