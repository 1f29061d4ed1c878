"""An Ollama Modelfile: which GGUF, how messages become its prompt, and where answers end.

Ollama's templates are Go's. One is made of a Jinja template by looking at what it writes: what stands before and behind
the words of each role. It is taken only where it then writes the same for every probe; else the template is left out,
and Ollama goes by the Jinja one that lies in the GGUF, as far as it can.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

NAME = "Modelfile"
Message = tuple[str, str]  # role, content
_SYSTEM, _USER, _ANSWER, _AGAIN = "⟦be⟧", "⟦ask⟧", "⟦say⟧", "⟦more⟧"


class Form(NamedTuple):
    """What stands around the words of each role."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    last: str  # before the answer that is asked for
    system: tuple[str, str] | None  # None: there is none
    inside: bool = False  # whether the system's words stand in the first question

    def text(self, messages: Sequence[Message]) -> str:
        """What the Go template writes."""
        given = next((x for role, x in messages if role == "system"), None)
        out = ""
        for i, (role, x) in enumerate(messages):
            if role == "system":
                out += "" if self.inside or self.system is None else x.join(self.system)
            elif role == "user":
                put = given is not None and self.inside and self.system is not None and i <= 1
                before = (given or "").join(self.system) if put and self.system else ""
                out += self.user[0] + before + x + self.user[1]
            else:
                out += x.join(self.assistant)
        return out + self.last

    @property
    def go(self) -> str:
        """The Go template."""
        u, a, s = self.user, self.assistant, self.system
        before = "{{ if and $.System (le $i 1) }}" + "{{ $.System }}".join(s) + "{{ end }}" if s and self.inside else ""
        own = '{{ if eq $m.Role "system" }}' + "{{ $m.Content }}".join(s) + "{{ end }}" if s and not self.inside else ""
        return (
            "{{ range $i, $m := .Messages }}" + own
            + '{{ if eq $m.Role "user" }}' + u[0] + before + "{{ $m.Content }}" + u[1] + "{{ end }}"
            + '{{ if eq $m.Role "assistant" }}' + a[0] + "{{ $m.Content }}" + a[1] + "{{ end }}"
            + "{{ end }}" + self.last
        )  # fmt: skip


def form(render: Callable[[Sequence[Message]], str]) -> Form | None:
    """What a chat template writes, as a form; None where it is none.

    `render` gives the prompt for the next answer, without the token that texts begin with; it may raise.

    >>> f = form(lambda m: "".join(f"<{r}>{x}</{r}>" for r, x in m) + "<assistant>")
    >>> f.user, f.last, f.system
    (('<user>', '</user><assistant>'), '', ('<system>', '</system>'))
    """
    asked = [("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN)]
    one, more = render(asked[:1]), render(asked)
    if one.count(_USER) != 1 or any(more.count(x) != 1 for _, x in asked):
        return None
    before, tail = one.split(_USER)
    start, rest = more.split(_USER)
    between, rest = rest.split(_ANSWER)
    behind, end = rest.split(_AGAIN)
    if start != before or end != tail or not behind.endswith(before):
        return None
    same = _common(between, tail)
    plain = Form((before, between[:same]), (between[same:], behind.removesuffix(before)), tail[same:], None)
    if any(mark in str(plain) for mark in ("{{", '"""')):
        return None
    found = _with_system(plain, lambda: render([("system", _SYSTEM), *asked[:1]]))
    probes = [
        [("system", "Be brief."), ("user", "Why?")],
        [("system", "Be brief."), *asked, ("assistant", "b"), asked[0]],
    ]
    if found is not None and all(found.text(p) == _try(render, p) for p in probes):
        return found
    return plain


def _with_system(plain: Form, rendered: Callable[[], str]) -> Form | None:
    text = _try(lambda _: rendered(), [])
    if text is None or text.count(_SYSTEM) != 1 or text.count(_USER) != 1:
        return None
    before, rest = text.split(_SYSTEM)
    between, _ = rest.split(_USER)
    if between.endswith(plain.user[0]):
        return plain._replace(system=(before, between.removesuffix(plain.user[0])))
    if before.startswith(plain.user[0]):
        return plain._replace(system=(before.removeprefix(plain.user[0]), between), inside=True)
    return None


def _try(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> str | None:
    import jinja2

    try:
        return render(messages)
    except jinja2.TemplateError:  # it refuses such messages
        return None


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def modelfile(
    model: str, words: Any, template: str | None, ends: Sequence[str], system: str | None = None
) -> tuple[str, str]:
    """A Modelfile, and a remark on what it lacks, if anything.

    Args:
      model: the GGUF, from the Modelfile's folder.
      words: the tokenizer, which renders the template.
      template: the chat template, in Jinja.
      ends: texts at which answers end.
      system: the system message, if the model is to have one.
    """

    def render(messages: Sequence[Message], whole: bool = False) -> str:
        rows = [{"role": r, "content": x} for r, x in messages]
        text = words.apply_chat_template(rows, chat_template=template, tokenize=False, add_generation_prompt=True)
        return text if whole else text.removeprefix(words.bos_token or "")

    lines, remark = [f"FROM ./{model}"], ""
    if template is None:
        remark = f"{NAME}: the model has no chat template, so there is no TEMPLATE"
    elif (found := form(lambda m: render(m))) is None:
        remark = f"{NAME}: the chat template is of a kind that is not written in Go; Ollama goes by the GGUF's own"
    else:
        begins = render([("user", "a")], whole=True).startswith(words.bos_token or "\0")
        own = begins and words("a").input_ids[:1] != [words.bos_token_id]  # else whoever reads the text puts it there
        lines.append(f'TEMPLATE """{words.bos_token if own else ""}{found.go}"""')
        if found.system is None:
            remark = f"{NAME}: TEMPLATE has no place for a system message, as the chat template has none that it knows"
    lines += [f"PARAMETER stop {json.dumps(x, ensure_ascii=False)}" for x in dict.fromkeys(ends)]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n", remark
