"""Patterns of personal data and secrets, and masks in their place."""

import math
import re
from collections import Counter

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-])")
PHONE = re.compile(
    r"(?<![\w+])(?:"
    r"\+\d{1,3}(?:[ .()/-]{0,2}\d){7,12}"  # +49 30 1234567
    r"|\(\d{2,5}\)[ -]?\d{3,4}[ .-]?\d{3,4}"  # (555) 123-4567
    r"|\d{3}([.-])\d{3}\1\d{4}"  # 555-123-4567
    r"|1[3-9]\d{9}"  # a Chinese mobile number
    r")(?![\w-])"
)
CUED_PHONE = re.compile(
    r"(?i)\b(tel|telephone|phone|mobile|cell|fax|telefon|whatsapp)\b(\.?\s*(?:number|no\.?|nr\.?|is|:|#)*\s*:?\s*)"
    r"(\d(?:[ .()/-]{0,2}\d){6,13})(?![\w-])"
)
KEYS = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]{0,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----)?"
    r"|(?<![\w-])(?:"
    r"sk-(?:[a-z]+-)*[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|hf_[A-Za-z0-9]{20,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}"
    r"|AIza[\w-]{35}"
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"  # a JSON web token
    r")(?![\w-])"
)
ASSIGNED = re.compile(
    r"(?i)(\b(?:\w*[_-])?(?:api[_-]?key|access[_-]?key|secret(?:[_-]?key)?|auth[_-]?token|token|password|passwd|pwd)\b"
    r"[\"']?\s*(?:=|:|=>)\s*[\"']?)([^\s\"'<>,;]{8,200})"
)
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(
    r"(?<![\w.-])(?:\d{4}(?P<gap>[ -])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}|3[47]\d\d(?P<six>[ -])\d{6}(?P=six)\d{5})"
    r"(?![\w-])"
)
BARE_CARD = re.compile(r"(?<![\w.-])\d{14,19}(?![\w-])")  # may as well be a number to calculate with
CARD_CUE = re.compile(r"(?i)card|visa|amex|american express|credit|debit|cvv|cvc|karte|tarjeta|卡")
_ISSUERS = re.compile(r"4|5[1-5]|2[2-7]|3[0-9]|6")


def without_emails(text: str) -> str:
    """
    >>> without_emails("write to a.b+c@mail.example.org.")
    'write to <EMAIL>.'
    """
    return EMAIL.sub("<EMAIL>", text) if "@" in text else text


def without_phones(text: str) -> str:
    """
    >>> without_phones("call +1 (555) 123-4567, or phone: 5551234567; 1000 + 2000 = 3000")
    'call <PHONE>, or phone: <PHONE>; 1000 + 2000 = 3000'
    """
    return CUED_PHONE.sub(r"\1\2<PHONE>", PHONE.sub("<PHONE>", text)) if _digits(text, 7) else text


def without_keys(text: str) -> str:
    """
    >>> without_keys("password = x7Gq2!kPz9 and token: word")
    'password = <SECRET> and token: word'
    """
    text = KEYS.sub("<SECRET>", text)
    return ASSIGNED.sub(lambda m: f"{m[1]}<SECRET>" if _random(m[2]) else m[0], text)


def without_accounts(text: str) -> str:
    """
    >>> without_accounts("DE89 3704 0044 0532 0130 00 and 4111 1111 1111 1111, not 4111 1111 1111 1112")
    '<IBAN> and <CARD>, not 4111 1111 1111 1112'
    """
    if not _digits(text, 12):
        return text
    text = IBAN.sub(lambda m: "<IBAN>" if _iban(m[0]) else m[0], text)
    for pattern in (CARD, BARE_CARD) if CARD_CUE.search(text) else (CARD,):
        text = pattern.sub(lambda m: "<CARD>" if _luhn(m[0]) else m[0], text)
    return text


def without_any(text: str) -> str:
    """A text as it may be shown."""
    return without_phones(without_accounts(without_emails(without_keys(text))))


def _digits(text: str, n: int) -> bool:
    return sum(map(str.isdigit, text)) >= n


def _random(value: str) -> bool:
    """Whether a value is no word: letters and digits of at least 3 bits of entropy each."""
    if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))):
        return False
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) >= 3.0 - 1e-9


def _iban(text: str) -> bool:
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _luhn(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()]
    if len(set(digits)) == 1 or not _ISSUERS.match(text):
        return False
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0
