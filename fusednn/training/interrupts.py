"""Ctrl-C between steps, and not in the middle of one."""

import signal
import threading
from types import TracebackType
from typing import Any


class Interrupts:
    """Within it Ctrl-C only makes `pending` true; on leaving, its handler runs, which raises KeyboardInterrupt.

    In another thread than the main one, which alone gets signals, it does nothing.
    """

    def __enter__(self) -> "Interrupts":
        self._signal: tuple[Any, ...] | None = None
        self._handler = (
            signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
        )
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *arguments: Any) -> None:
        self._signal = arguments

    @property
    def pending(self) -> bool:
        """Whether somebody wants the training to stop."""
        return self._signal is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._handler)
            if self._signal is not None:
                self._handler(*self._signal)
