"""Personal data and secrets: what must not be learnt by heart. Findings never show them."""

from collections.abc import Callable

from jaxtune.prepare.checks import masks
from jaxtune.prepare.checks.repair import changes, repaired
from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Table


def emails(table: Table, look: Look) -> Finding:
    """E-mail addresses."""
    return _masking(table, "rows hold e-mail addresses", masks.without_emails)


def phones(table: Table, look: Look) -> Finding:
    """Phone numbers: international, with an area code in brackets, in groups of 3-3-4, or after a word that says so."""
    return _masking(table, "rows hold phone numbers", masks.without_phones)


def keys(table: Table, look: Look) -> Finding:
    """API keys, private keys, web tokens, and assignments of random-looking values to names such as `password`."""
    return _masking(table, "rows hold keys, tokens or passwords", masks.without_keys)


def accounts(table: Table, look: Look) -> Finding:
    """Bank accounts (IBAN, by its check digits) and credit cards (by Luhn's)."""
    return _masking(table, "rows hold bank accounts or credit cards", masks.without_accounts)


def _masking(table: Table, title: str, mask: Callable[[str], str]) -> Finding:
    return repaired(table, changes(table, mask), title, "put a mask in their place")
