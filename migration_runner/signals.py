"""SIGTERM and SIGINT end a run within a grace period, even in a statement or on a dead network.

psycopg2 waits for a statement in C, where no Python handler runs. So the signal wakes a thread (through the wakeup
file descriptor), which cancels the statement on a second connection; then the handler's exception is raised.
PQcancel needs no connection, but blocks the whole process when the network is dead.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from migration_runner.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Well below a pod's grace period after SIGTERM, and short enough for a person after Ctrl-C.
SHUTDOWN_GRACE_SECONDS = 1.7


class StopSignal:
    """The signal that arrived, if any; `in_control` is set once Python code runs again, not a statement."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.in_control = threading.Event()

    def check(self) -> None:
        """Raise Interrupted again if the handler's own was swallowed: in a destructor, in psycopg2's decoder."""
        if self.received:
            raise Interrupted

    @property
    def name(self) -> str | None:
        return self.received.name if self.received else None


@contextmanager
def interruptible(
    stop: StopSignal, cancel: Callable[[], None], last_line: Callable[[], str], killed_line: Callable[[str], str]
) -> Iterator[None]:
    """Let a stop signal end the block: `cancel` (in a thread) interrupts what waits in C, then `last_line` is printed.

    If the block does not end within SHUTDOWN_GRACE_SECONDS, the process prints `killed_line` of the signal's name,
    which the handler may not have received, and exits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    armed = False  # else it could be raised while the handlers are installed or removed, where nothing catches it

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.received is None:  # once: a second one would interrupt the cleanup
            stop.received = signal.Signals(number)
            if armed:
                raise Interrupted

    unraisable = sys.unraisablehook
    sys.unraisablehook = lambda args: None if args.exc_type is Interrupted else unraisable(args)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(reader, ended, cancel, killed_line), daemon=True)
    thread.start()
    try:
        try:
            armed = True
            stop.check()
            yield
        finally:
            armed = False
    except Interrupted:
        stop.in_control.set()
        line = last_line()
        ended.set()  # only one of the two lines
        print(f"FAILED: {line}", file=sys.stderr)
        assert stop.received
        raise SystemExit(128 + stop.received) from None
    finally:
        stop.in_control.set()
        sys.unraisablehook = unraisable
        signal.set_wakeup_fd(wakeup)
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()


def _watch(
    reader: socket.socket, ended: threading.Event, cancel: Callable[[], None], killed_line: Callable[[str], str]
) -> None:
    """The thread: wait for a signal, cancel the statement, and end the process if nothing else does."""
    with reader:  # kept open: a second signal is written, too
        number = reader.recv(1)
        while number and number[0] not in STOP_SIGNALS:
            number = reader.recv(1)
        if not number:  # the block ended and closed the other end
            return
        threading.Thread(target=cancel, daemon=True).start()
        if not ended.wait(SHUTDOWN_GRACE_SECONDS):
            try:
                print(f"FAILED: {killed_line(signal.Signals(number[0]).name)}", file=sys.stderr, flush=True)
            finally:
                os._exit(128 + number[0])
