"""A conversation's text, and where in it the assistant's turns are.

Both follow from rendering alone. Where the template says which parts are the assistant's (`{% generation %}`), that
holds. Else a turn is what the template adds to the prompt that the model would have been given there, so what is
trained on is what it would have had to write; a template that writes an earlier turn otherwise once more follows has
no such place and is refused.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from jaxtune.data.examples import Conversation, Message
from jaxtune.data.rendering import Rendered, render
from jaxtune.errors import UserError

# The names under which templates take these wishes. Each template knows some of them.
_THINKING: dict[str, dict[str, bool]] = {
    "auto": {},
    "on": {"enable_thinking": True, "thinking": True, "open_thinking": True},
    "off": {"enable_thinking": False, "thinking": False, "open_thinking": False},
    "keep": {"preserve_thinking": True, "clear_thinking": False},
}


class Turns(NamedTuple):
    """A conversation as text."""

    text: str
    answers: dict[int, tuple[int, int]]  # message number → where in the text the assistant's words begin and end
    trained: list[tuple[int, int]]  # parts of the text with loss


class Texts(NamedTuple):
    """How conversations become text: all but the conversation itself."""

    tokenizer: Any
    template: str
    thinking: str = "auto"
    space: bool = False  # whether a turn goes on over the white space after it

    def __call__(self, c: Conversation, turns: Sequence[tuple[int, bool]]) -> list[Rendered]:
        """The first n messages, each with or without the assistant's header after them."""
        tokens = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        variables = {**tokens, "tools": list(c.tools) or None, **self._wishes(c)}
        return render(self.template, [m.seen() for m in c.messages], turns, c.origin, variables)

    def _wishes(self, c: Conversation) -> dict[str, bool]:
        def known(word: str) -> bool:
            return re.search(rf"(?<![\w.'\"]){word}(?![\w'\"])", self.template) is not None

        for word, wanted in {
            "tools": bool(c.tools),
            "tool_calls": any(m.extra.get("tool_calls") for m in c.messages),
        }.items():
            if wanted and word not in self.template:
                raise UserError(
                    f"{c.origin}: the conversation has {word.replace('_', ' ')}, and the chat template no place for "
                    "them; name another with data.template, such as qwen3, chatml or mistral_v3"
                )
        wishes = _THINKING[self.thinking]
        if wishes and not any(map(known, wishes)):
            raise UserError(
                f"data.thinking={self.thinking}: the chat template has none of {', '.join(wishes)}; leave it auto, or "
                "set data.template=qwen3"
            )
        return wishes


def with_system(c: Conversation, system: str | None) -> Conversation:
    """The conversation with a system message, where it had none."""
    if system is None or (c.messages and c.messages[0].role == "system"):
        return c
    return c._replace(messages=(Message("system", system), *c.messages))


def lay_out(c: Conversation, texts: Texts, train_on: str) -> Turns:
    """The text and its turns.

    Args:
      c: the conversation.
      texts: how it is rendered.
      train_on: "assistant" has loss on every assistant turn, "last" on the last one, "all" on everything; never on
        turns that are not to be trained on.

    Raises:
      UserError: there is no assistant turn, or the template writes one otherwise once more follows.
    """
    spoken = [i for i, m in enumerate(c.messages) if m.role == "assistant"]
    chosen = [i for i in spoken if c.messages[i].trained]
    if train_on == "all":
        text, left_out, _ = find(c, texts, [i for i in spoken if i not in chosen])
        edges = [0, *(edge for _, span in sorted(left_out.items()) for edge in span), len(text)]
        return Turns(text, {}, list(zip(edges[::2], edges[1::2], strict=True)))
    if not spoken:
        raise UserError(f"{c.origin}: has no assistant turn to train on; add one or set data.train_on=all")
    text, answers, marked = find(c, texts, chosen[-1:] if train_on == "last" else chosen)
    return Turns(text, answers, list(answers.values()) or marked)


def find(
    c: Conversation, texts: Texts, wanted: Collection[int]
) -> tuple[str, dict[int, tuple[int, int]], list[tuple[int, int]]]:
    """The whole text, where the given assistant turns begin and end in it, and what is marked of them if not whole."""
    spoken = [i for i, m in enumerate(c.messages) if m.role == "assistant"]
    jobs = [job for i in wanted for job in ((i, True), (i + 1, False)) if i]
    (text, marked), *parts = texts(c, [(len(c.messages), False), *jobs])
    if marked:
        if len(marked) == len(spoken):
            return text, {i: span for i, span in zip(spoken, marked, strict=True) if i in wanted}, []
        if [*wanted] == spoken or not wanted:  # parts of turns are marked, and all of them are wanted, or none
            return text, {}, marked if wanted else []
        raise UserError(
            f"{c.origin}: the chat template marks {len(marked)} parts as the assistant's, of {len(spoken)} turns, so "
            "single turns cannot be chosen; set data.train_on=assistant, or another data.template"
        )
    made = iter(parts)
    eos = texts.tokenizer.eos_token or ""
    answers = {}
    for i in wanted:
        if i:
            before, upto = next(made).text, next(made).text
        else:  # nothing comes before it: the header is what the template puts after any question
            before, upto = _first(c, texts, text)
        if eos and not text.startswith(upto):
            upto = upto.removesuffix(eos)  # which some templates (Phi-3's) put once, after all turns
        if not (text.startswith(upto) and upto.startswith(before)):
            raise UserError(
                f"{c.origin}: the chat template rewrites turn {i} when more follows, so what the model would see "
                "differs; set data.train_on=last, or data.thinking=keep where the template knows it (qwen3 does), or "
                "another data.template"
            )
        answers[i] = len(before), max(len(before), len(upto if texts.space else upto.rstrip()))
    return text, answers, []


def _first(c: Conversation, texts: Texts, text: str) -> tuple[str, str]:
    question = c._replace(messages=(Message("user", "a"),))
    asked, prompted = (t.text for t in texts(question, [(1, False), (1, True)]))
    asked = asked if prompted.startswith(asked) else asked.removesuffix(texts.tokenizer.eos_token or "")
    header = prompted.removeprefix(asked)
    [upto] = texts(c, [(1, False)])
    at = text.find(header)
    if at < 0 or not prompted.startswith(asked):
        raise UserError(
            f"{c.origin}: begins with the assistant, and where its words begin cannot be told with this chat "
            "template; begin with a question, or set another data.template"
        )
    return text[: at + len(header)], upto.text
