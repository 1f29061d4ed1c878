"""Chat templates, all of them Jinja as Hugging Face writes it: the tokenizer's own first, else one that suits the data.

What is chosen here is exported with the tuned model, so that it is prompted as it was trained. Hugging Face's Jinja
drops a newline that follows a block, hence `{{ '\\n' }}` there.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxtune.errors import UserError, nearest

TEMPLATES: Mapping[str, str] = {
    # prompt and completion as they are, one after the other
    "plain": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # Stanford Alpaca (Taori et al., 2023)
    "alpaca": (
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "{% endif %}{{ '\\n\\n' }}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    # plain words for a base model without special tokens
    "roles": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ m.role | capitalize }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
_SUITS = {"prompt_completion": "plain", "alpaca": "alpaca", "messages": "roles"}


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
    name = _SUITS[format] if wanted == "auto" else wanted
    if name in TEMPLATES:
        return TEMPLATES[name], name
    if name.endswith((".jinja", ".jinja2", ".j2")):
        try:
            return Path(name).read_text(), name
        except OSError as e:
            raise UserError(f"data.template: {name}: {e.strerror}") from e
    raise UserError(f"data.template {name!r} is neither a Jinja file nor known{nearest(name, ['auto', *TEMPLATES])}")
