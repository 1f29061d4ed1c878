"""Becomes a program that ends with its parent, by SIGTERM, so that it saves. Not to be imported: `child` runs it."""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Become `command`, unless the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold users' rows
    os.execv(command[0], command)  # noqa: S606 a list of arguments, no shell


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
