"""Ending soon when told to, by SIGINT (Ctrl-C) or SIGTERM.

Whatever is on disk is complete at any moment (`files`), so a run may end anywhere.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 3.5  # seconds in which a run can end by itself
SENTENCE = "dynslice: interrupted; what was finished is kept, give the same command again to go on"


@contextmanager
def handled() -> Iterator[None]:
    """Both signals raise KeyboardInterrupt; a library is waited for no longer than PATIENCE."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    told, teller = socket.socketpair()
    teller.setblocking(False)
    before = signal.signal(signal.SIGTERM, _raise)
    wakeup = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    ended = threading.Event()
    threading.Thread(target=_end, args=(told, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        teller.close()


def handle_again() -> None:
    """Take SIGTERM back from a library that took it for itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise)


def status(stop: KeyboardInterrupt) -> int:
    """The exit status that tells which signal it was."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def kill_children() -> None:
    """End the processes that this one started, such as kernels of notebooks."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def _raise(number: int, _frame) -> None:
    raise KeyboardInterrupt(number)


def _end(told: socket.socket, ended: threading.Event) -> None:
    """Wait for a signal (the system writes its number), then for the end, and make one."""
    with told:
        while number := told.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM) and not ended.wait(PATIENCE):
                print(SENTENCE, file=sys.stderr, flush=True)
                kill_children()
                os._exit(128 + number[0])
