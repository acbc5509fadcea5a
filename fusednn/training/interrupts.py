"""Ctrl-C, and other signals, between steps, and not in the middle of one."""

import ctypes
import signal
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any

_signal: Any = getattr(signal, "_signal", signal)
"""The C module beneath `signal`, which makes an enum of each answer: 100 us for all signals instead of 5."""

SIGNALS = tuple(map(int, signal.valid_signals()))
_ACTION_BYTES = 512  # more than C's struct sigaction has anywhere


def _sigaction() -> Any:
    """C's sigaction, or None where there is none."""
    try:
        return ctypes.CDLL(None).sigaction
    except (AttributeError, OSError, TypeError):  # Windows
        return None


class Interrupts:
    """Within it a signal that has a handler in Python, as Ctrl-C has, only makes `pending` true.

    On leaving the handlers run, of which Ctrl-C's raises KeyboardInterrupt and a time limit's what it likes. In another
    thread than the main one, which alone gets signals, it does nothing. What `signal.siginterrupt` has set, which
    `signal.signal` would undo, stays: the C handler is Python's own before and after.
    """

    _sigaction = staticmethod(_sigaction())

    def __enter__(self) -> "Interrupts":
        self._signals: list[tuple[Any, ...]] = []
        self._handlers: list[tuple[int, Any, Any]] = []
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    action = self._action(number)
                    self._handlers.append((number, handler, action))
                    self._handle(number, self._note, action)
        return self

    def _action(self, number: int) -> Any:
        """What the system does at signal `number`."""
        if self._sigaction is None:
            return None
        action = ctypes.create_string_buffer(_ACTION_BYTES)
        return None if self._sigaction(number, None, action) else action

    def _handle(self, number: int, handler: Any, action: Any) -> None:
        _signal.signal(number, handler)
        if action is not None:
            self._sigaction(number, action, None)

    def _note(self, *arguments: Any) -> None:
        self._signals.append(arguments)

    @property
    def pending(self) -> bool:
        """Whether somebody wants the training to stop."""
        return bool(self._signals)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler, action in self._handlers:
            self._handle(number, handler, action)
        if self._signals:
            handlers = {number: handler for number, handler, _ in self._handlers}
            with ExitStack() as stack:  # one that raises does not keep the others from running
                for arguments in reversed(self._signals):
                    stack.callback(handlers[arguments[0]], *arguments)
