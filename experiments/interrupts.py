"""Ctrl-C and SIGTERM end a command with one line: no traceback, no half-written file.

Python turns Ctrl-C into an exception in the main thread. That waits until compiled code returns, and libraries lose it
or print it as a traceback of their own. Here a thread ends the process instead, whatever the main thread is doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

WRITING = threading.RLock()  # held while a file is written, which the end of the process waits for
PATIENCE = 10.0  # seconds of that wait: a disk that hangs does not keep the process alive


def nothing_yet() -> str:
    """The line of a command that has no folder yet."""
    return "interrupted; nothing was computed yet"


say: Callable[[], str] = nothing_yet  # makes the line; a run sets one that looks into its folder


def install() -> None:
    """From now on SIGINT and SIGTERM end this process with a line and the status 128 + their number.

    A signal that is ignored stays ignored: shells ignore SIGINT for the jobs that a script starts with ``&``, since
    Ctrl-C is not meant for them.
    """
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in handled:
        signal.signal(number, lambda *_: None)  # what counts is the byte that comes through the pipe, at once
    threading.Thread(target=_wait, args=(reader, handled), name="interrupts", daemon=True).start()


def _wait(reader, handled):
    while (number := os.read(reader, 1)[0]) not in handled:
        pass
    WRITING.acquire(timeout=PATIENCE)
    with contextlib.suppress(Exception):  # such as that of a terminal that was closed
        sys.stdout.flush()
        print("\n" * sys.stderr.isatty() + say(), file=sys.stderr, flush=True)  # a bar may stand on the line
    os._exit(128 + number)
