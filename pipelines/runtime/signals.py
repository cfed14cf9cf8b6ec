"""Signals: every command ends in order by Ctrl-C, SIGTERM and SIGHUP, and long work first saves what it did."""

import os
import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from pipelines.errors import Interrupted

# One that comes again within this time is the same request: `make` and `timeout` pass on what the whole group gets.
SAME_REQUEST_SECONDS = 0.5


class _Handlers(ABC):
    """Context manager that handles the first signal in its own way; a second one quits immediately.

    Attributes:
        signal_number: of the first signal; 0: none came.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._time = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Signal handlers can be set in the main thread only; elsewhere the caller's thread decides.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` asks to outlive the terminal
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal_number:
            self.signal_number, self._time = number, now
            self._answer(number, frame)
        elif now - self._time >= SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    @abstractmethod
    def _answer(self, number: int, frame: FrameType | None) -> None:
        """Called with the first signal."""


class Interrupts(_Handlers):
    """Inside it the first signal raises `Interrupted`, as Ctrl-C does; during an import it ends the process in silence.

    An import that is interrupted fails in ways of its own, and has nothing to save.
    """

    def _answer(self, number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if "importlib._bootstrap" in frame.f_code.co_filename:
                os._exit(128 + number)
            frame = frame.f_back
        warnings.simplefilter("ignore", RuntimeWarning)  # of asyncio, about the calls that are given up
        raise Interrupted(number)


class StopRequest(_Handlers):
    """Inside it `signal_number` becomes non-zero when the run should save and stop."""

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def _answer(self, number: int, frame: FrameType | None) -> None:
        # Written past Python's buffers: the signal may have come in the middle of a print. The terminal may be gone.
        name = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"\n{name}: saving after this step; press Ctrl-C again to quit immediately\n".encode())


class CallOnSignal(_Handlers):
    """Inside it the first signal calls a function, such as one that ends an event loop."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call

    def _answer(self, number: int, frame: FrameType | None) -> None:
        self._call()
