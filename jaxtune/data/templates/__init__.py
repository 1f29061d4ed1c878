"""Chat templates, all of them Jinja as Hugging Face writes it: the tokenizer's own first, else one that suits the data.

What is chosen here is exported with the tuned model, so that it is prompted as it was trained. Each template writes
the text that its model's makers document.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxtune.errors import UserError, nearest

_FILES = {f.stem: f.read_text(encoding="utf-8").rstrip("\n") for f in sorted(Path(__file__).parent.glob("*.jinja"))}
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

TEMPLATES: Mapping[str, str] = {
    **_FILES,
    "qwen": f"{{%- set default_system = '{_QWEN}' -%}}\n{_FILES['chatml']}",  # Qwen2.5
    "mistral_v3_tekken": f"{{%- set gap = '' -%}}\n{_FILES['mistral_v3']}",  # without spaces, for its newer tokenizer
    "mistral_v7_tekken": f"{{%- set gap = '' -%}}\n{_FILES['mistral_v7']}",
    "phi": _FILES["phi3"],
}
_SUITS = {"prompt_completion": "plain", "alpaca": "alpaca"}  # a base without a template; other formats take "roles"


def choose(wanted: str, own: str | None, format: str) -> tuple[str, str]:
    """A template's text, and where it is from.

    Args:
      wanted: "auto", a name of `TEMPLATES`, or a Jinja file.
      own: the tokenizer's own template, if it has one.
      format: the format of the data, which decides where there is no own template.

    Raises:
      UserError: there is no such template.
    """
    if wanted == "auto" and own is not None:
        return own, "the tokenizer's own"
    name = _SUITS.get(format, "roles") if wanted == "auto" else wanted
    if name in TEMPLATES:
        return TEMPLATES[name], name
    if name.endswith((".jinja", ".jinja2", ".j2")):
        try:
            return Path(name).read_text(encoding="utf-8"), name
        except OSError as e:
            raise UserError(f"data.template: {name}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise UserError(f"data.template: {name}: not UTF-8 text; save it as UTF-8") from e
    raise UserError(f"data.template {name!r} is neither a Jinja file nor known{nearest(name, ['auto', *TEMPLATES])}")
