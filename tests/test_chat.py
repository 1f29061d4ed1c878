import pytest

from jaxtune.chat import Chat
from jaxtune.data.examples import Message
from jaxtune.errors import UserError
from jaxtune.generate import Sampling


class Heard:
    """A model that answers with its name, and remembers what it was asked."""

    def __init__(self, name):
        self.name, self.heard = name, []

    def stream(self, messages, s):
        self.heard.append([m.content for m in messages])
        yield from self.name


def test_the_conversation_stays_when_the_adapter_changes():
    said, a, none = [], Heard("a"), Heard("none")
    chat = Chat({"a": a, "none": none}, "be brief", Sampling(), said.append)
    for line in ("one", "/adapter none", "two", "/compare three", "", "four"):
        chat.read(line)
    assert a.heard == [["be brief", "one"], ["be brief", "one", "a", "two", "none", "three"]]
    assert none.heard[-1] == ["be brief", "one", "a", "two", "none", "four"]
    assert "".join(said) == "a\nnone\n[a]\na\n[none]\nnone\nnone\n"
    for line in ("/adapter b", "/compare "):
        with pytest.raises(UserError, match="/adapter b: no adapter of this name|has no text"):
            chat.read(line)
    chat.read("/reset")
    assert chat.messages == [Message("system", "be brief")]
    assert chat.name == "none"
