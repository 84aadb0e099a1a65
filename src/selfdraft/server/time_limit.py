"""Work with a limit in time: a chat template is a program of the checkpoint's author."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


class _OutOfTime(BaseException):
    """Raised inside the work. Not an Exception, so that the work does not catch it."""


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of `work`, which runs in a thread of its own. Raises TimeoutError after so many seconds; the
    thread is then ended at its next line of Python."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(_OutOfTime)
            )
        raise
