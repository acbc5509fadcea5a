"""How many steps go to a device at a time: few enough that Ctrl-C is heard soon, enough that Python does not count."""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_SECONDS = 0.04
"""How long a chunk of steps should take: Ctrl-C waits for two."""


class Pace:
    """Sends off chunks of steps, never more than two at a time, and finds out how many steps a chunk should have.

    What is computed does not depend on it.
    """

    def __init__(self, data: Tensor, first: int, most: int) -> None:
        """`data` says on which device; a first chunk has at most `first` steps, any at most `most`."""
        self.place, self.device = data.device, data.device if data.is_cuda else None
        self.chunk, self.most = max(1, min(first, most)), most
        self.marks: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def send(self, steps: int, launch: Callable[[int], None]) -> None:
        """Let `launch` launch so many steps; wait for the chunk before it."""
        if self.device is None:  # the interpreter, or a device that is waited for
            begin = time.monotonic()
            launch(steps)
            if self.place.type != "cpu":
                torch.accelerator.synchronize(self.place)
            self._adapt(steps, time.monotonic() - begin)
            return
        started = self._mark()
        launch(steps)
        self.marks.append((steps, started, self._mark()))
        if len(self.marks) > 1:
            steps, started, ended = self.marks.popleft()
            ended.synchronize()
            self._adapt(steps, started.elapsed_time(ended) / 1000)

    def _mark(self) -> torch.cuda.Event:
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def _adapt(self, steps: int, seconds: float) -> None:
        self.chunk = max(1, min(self.most, 4 * self.chunk, int(steps * CHUNK_SECONDS / max(seconds, 1e-6))))
