"""What a program said, made fit for others' eyes: without folders of this machine and without secrets."""

import re

_FOLDERS = re.compile(r"(?:\bfile://|(?<![\w./])(?!//))/(?:[^\s/:'\"`,;()]+/)+")
_SECRETS = re.compile(r"\b(?:hf_|sk-|github_pat_|ghp_|AKIA|ya29\.)[\w.-]{8,}|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")


def redacted(text: str) -> str:
    """A text without the folders of absolute paths, and without what looks like a token or a password.

    >>> redacted("error: /srv/data/jobs/x/run: full; hf_abcdefghij")
    'error: run: full; [secret]'
    """
    return _SECRETS.sub("[secret]", _FOLDERS.sub("", text))
