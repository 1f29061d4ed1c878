"""The inference process: `python -m jaxtune.serve.inference BYTES PARENT`, see `asks` for what it is told and tells.

It ends with its input, or with the process that started it.
"""

import ctypes
import os
import signal
import sys

_DEATH_SIGNAL = 1  # of prctl


def main() -> None:
    """Answer until the input ends."""
    budget, parent = int(sys.argv[1]), int(sys.argv[2])
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the input
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            return
    from jaxtune.serve.inference.process import Process

    process = Process(budget, out)
    process.run(sys.stdin.buffer)


if __name__ == "__main__":
    main()
