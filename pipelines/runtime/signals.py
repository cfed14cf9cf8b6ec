"""Stopping a long run: the first SIGINT or SIGTERM asks it to save after its step, a second one quits immediately."""

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Context manager; inside it `signal_number` becomes non-zero when the run should save and stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def __enter__(self) -> "StopRequest":
        # Signal handlers can be set in the main thread only; elsewhere the caller's thread decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            os._exit(128 + number)
        self.signal_number = number
        # Written past Python's buffers: the signal may have come in the middle of a print.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; press Ctrl-C again to quit immediately\n".encode())
