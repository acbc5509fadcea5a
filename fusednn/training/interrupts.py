"""Ctrl-C, and other signals, between steps, and not in the middle of one."""

import signal
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any


class Interrupts:
    """Within it a signal that has a handler in Python, as Ctrl-C has, only makes `pending` true.

    On leaving the handlers run, of which Ctrl-C's raises KeyboardInterrupt and a time limit's what it likes. In another
    thread than the main one, which alone gets signals, it does nothing.
    """

    def __enter__(self) -> "Interrupts":
        self._signals: list[tuple[Any, ...]] = []
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in signal.valid_signals()}
            self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
            for number in self._handlers:
                signal.signal(number, self._note)
        return self

    def _note(self, *arguments: Any) -> None:
        self._signals.append(arguments)

    @property
    def pending(self) -> bool:
        """Whether somebody wants the training to stop."""
        return bool(self._signals)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with ExitStack() as stack:  # one that raises does not keep the others from running
            for arguments in reversed(self._signals):
                stack.callback(self._handlers[arguments[0]], *arguments)
