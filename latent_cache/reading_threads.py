"""Threads that read ahead, and that a program which ends does not wait for."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Task = tuple[Future[None], Callable[..., None], tuple[Any, ...]] | None


class ReadingThreads:
    """A few threads that do one task after the other, begun at the first task.

    Not a ThreadPoolExecutor, because at the end of a program that one waits until all that is queued is done.

    Args:
        count: of threads.
        name: that theirs begin with.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        # They know the queue only: whoever forgets to close a sampler loses the sampler, and then its threads.
        self._end = weakref.finalize(self, _end, self._tasks, count)
        self._end.atexit = False
        self._started = False

    def submit(self, task: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have a task done in its turn."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        future: Future[None] = Future()
        self._tasks.put((future, task, arguments))
        return future

    def close(self) -> None:
        """Wait until all tasks are done, and end. Safe to call twice; no task comes after it."""
        self._end()
        if self._started:
            for thread in self._threads:
                thread.join()


def _work(tasks: "SimpleQueue[_Task]") -> None:
    while (next_task := tasks.get()) is not None:
        future, task, arguments = next_task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task(*arguments))
            except BaseException as error:  # handed to the one who waits
                future.set_exception(error)
        del next_task, future, task, arguments  # while it waits, it must not keep a sampler alive


def _end(tasks: "SimpleQueue[_Task]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)
