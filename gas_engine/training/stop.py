"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """SIGTERM and the first SIGINT ask for a stop once the update is done; a second SIGINT interrupts.

    with Stop() as stop:
        while not stop.asked: ...
    raise SystemExit(stop.exit_code)
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        return self.asked.name if self.asked else "a signal to another rank"

    @property
    def exit_code(self) -> int:
        """What a shell calls a process that the signal ended: 143 or 130."""
        return 128 + (self.asked or signal.SIGTERM)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python knows handlers there only
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
