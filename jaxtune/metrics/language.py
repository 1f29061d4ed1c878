"""Which language texts are written in, as far as tokenisation depends on it, and words of Chinese and Japanese."""

import re
from collections.abc import Iterable

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA, _HANGUL = "\u3040-\u30ff", "\uac00-\ud7af\u1100-\u11ff"
_WORD = re.compile(rf"[{_HAN}{_KANA}{_HANGUL}]|[^\W{_HAN}{_KANA}{_HANGUL}]+")


def of(texts: Iterable[str], wanted: str | None = None) -> str:
    """`wanted` where given ("zh-CN" is "zh"), else "zh", "ja", "ko" or "en" (for all others), by the letters.

    >>> of(["你好，世界"]), of(["今日は"]), of(["Guten Tag"]), of([], "zh-CN")
    ('zh', 'ja', 'en', 'zh')
    """
    if wanted is not None:
        return re.split("[-_]", wanted.lower())[0]
    text = "".join(texts)
    letters = max(1, len(re.findall(r"\w", text)))
    han, kana, hangul = (len(re.findall(f"[{x}]", text)) for x in (_HAN, _KANA, _HANGUL))
    if han + kana + hangul < 0.3 * letters:  # a name or a quotation in another script is no language
        return "en"
    if hangul > han + kana:
        return "ko"
    return "ja" if kana > 0.1 * (han + kana) else "zh"


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; each character of Chinese, Japanese and Korean is one.

    >>> words("我爱 JAX，2 times")
    ['我', '爱', 'jax', '2', 'times']
    """
    return _WORD.findall(text.lower())
