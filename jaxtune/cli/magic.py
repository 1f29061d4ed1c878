"""`%jaxtune VERB …` in notebooks: the verbs in the kernel's own process, which is the one that holds the devices."""

import contextlib
import shlex
from typing import Any

import typer

from jaxtune.cli.common import app
from jaxtune.errors import Interrupted, UserError

_ASKED: Any = next(k for k in typer.BadParameter.__mro__ if k.__name__ == "ClickException")  # typer's own, or click's


def register(shell: Any) -> None:
    """Give an IPython shell the magic; errors that a user can put right are then one line in it.

    >>> %load_ext jaxtune                                       # doctest: +SKIP
    >>> %jaxtune evaluate {run.folder} test.csv --max-samples 5  # doctest: +SKIP
    """

    def jaxtune(line: str) -> None:
        with contextlib.suppress(SystemExit):  # of --help
            app(shlex.split(line), standalone_mode=False)

    def one_line(shell: Any, kind: type, error: Exception, trace: Any, tb_offset: Any = None) -> list[str]:
        said = error.format_message() if isinstance(error, _ASKED) else str(error)
        lines = [f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {' '.join(said.split())}"]
        shell._showtraceback(kind, error, lines)
        return lines

    shell.register_magic_function(jaxtune)
    shell.set_custom_exc((UserError, Interrupted, _ASKED), one_line)
