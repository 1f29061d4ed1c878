"""A conversation in a terminal: with one model, or with a base whose adapters are switched under way."""

from collections.abc import Callable, Mapping

from jaxtune.data.examples import Message
from jaxtune.errors import UserError, nearest
from jaxtune.generate import Sampling
from jaxtune.tuned import Tuned


class Chat:
    """What was said so far, and who answers next."""

    def __init__(
        self, models: Mapping[str, Tuned], system: str | None, s: Sampling, write: Callable[[str], None]
    ) -> None:
        """`models` by name, of which the first answers at first; `write` gets every piece of text as it comes."""
        self.models, self.s, self.write = models, s, write
        self.name = next(iter(models))
        self.start = [Message("system", system)] if system else []
        self.messages = list(self.start)

    def read(self, line: str) -> None:
        """Do what a line asks: a command, or a message to be answered. `/compare` leaves the conversation as it is.

        Raises:
          UserError: a command is not as it should be; the conversation goes on.
        """
        command, _, rest = line.strip().partition(" ")
        if command == "/reset":
            self.messages = list(self.start)
        elif command == "/adapters":
            self.write("".join(f"{'*' if name == self.name else ' '} {name}\n" for name in self.models))
        elif command == "/adapter":
            if (name := rest.strip()) not in self.models:
                raise UserError(f"/adapter {name}: no adapter of this name{nearest(name, list(self.models))}")
            self.name = name
        elif command == "/compare":
            if not rest.strip():
                raise UserError("/compare: has no text; write what all shall answer behind it")
            for name in self.models:
                self.write(f"[{name}]\n")
                self._answer(name, [*self.messages, Message("user", rest.strip())])
        elif command:
            asked = [*self.messages, Message("user", line.strip())]
            self.messages = [*asked, Message("assistant", self._answer(self.name, asked))]

    def _answer(self, name: str, messages: list[Message]) -> str:
        pieces = []
        for piece in self.models[name].stream(messages, self.s):
            self.write(piece)
            pieces.append(piece)
        self.write("\n")
        return "".join(pieces)
