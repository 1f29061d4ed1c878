"""What is looked for, in the order in which it is looked for: repairs first, since they make rows alike or empty."""

from collections.abc import Mapping

from jaxtune.prepare.checks import duplicates, fields, labels, lengths, repair, secrets, text
from jaxtune.prepare.finding import Check

CHECKS: Mapping[str, Check] = {
    "mojibake": repair.mojibake,
    "control": repair.control,
    "keys": secrets.keys,
    "emails": secrets.emails,
    "accounts": secrets.accounts,
    "phones": secrets.phones,
    "missing": fields.missing,
    "extra": fields.extra,
    "duplicates": duplicates.duplicates,
    "conflicts": duplicates.conflicts,
    "leakage": duplicates.leakage,
    "near_duplicates": duplicates.near_duplicates,
    "too_long": lengths.too_long,
    "outliers": lengths.outliers,
    "case": repair.case,
    "language": text.language,
    "balance": labels.balance,
    "label_errors": labels.label_errors,
    "words": text.words,
}
