"""The command line: `jaxtune VERB …`, with `key=value` over any config.

Exit codes: 0 done, 2 something that the user can put right (one line says what), 75 stopped and saved, run it again.
"""

import contextlib
import errno
import sys
import traceback
from collections.abc import Iterator
from typing import Any

# ruff: noqa: I001
# they add their verbs, in the order of --help
from jaxtune.cli import run, plan, sweep, use, explain, prune, quantize, data, models, push, recipes  # noqa: F401
from jaxtune.cli import serve, files, jobs  # noqa: F401
from jaxtune.cli.common import app
from jaxtune.cli.recipes import recipe_folder
from jaxtune.errors import Interrupted, UserError

__all__ = ["main", "recipe_folder"]

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: list[str] | None = None) -> Any:
    """Run a verb; errors become one line and an exit code, or a stack trace with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with exit_codes("--debug" in arguments):
        app([a for a in arguments if a != "--debug"], standalone_mode=True)


@contextlib.contextmanager
def exit_codes(debug: bool = False) -> Iterator[None]:
    """Errors become one line and an exit code; one process of several does not wait for the others then."""
    try:
        with _one_line(debug):
            yield
    except BaseException as e:
        watch = sys.modules.get("jaxtune.watch")  # imported by those who train
        if watch is None or not watch.failed():
            raise
        if not isinstance(e, SystemExit):
            traceback.print_exception(e)
        watch.leave(e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1)


@contextlib.contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    try:
        yield
    except UserError as e:
        if debug:
            raise
        _fail(str(e))
    except OSError as e:
        if debug or e.errno is None:
            raise
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room" if full else "look at the path and its rights; --debug shows where"
        _fail(f"{e.filename or 'disk'}: {e.strerror}; {remedy}")
    except Interrupted as e:
        _fail(str(e), RESUME_ME)


def _fail(message: str, code: int = 2) -> None:
    print(f"{'error' if code == 2 else 'stopped'}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
