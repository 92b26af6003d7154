"""Questions that the event loop asks another thread."""

import asyncio
from collections.abc import Callable
from typing import TypeVar, cast

Result = TypeVar("Result")


def question(work: Callable[[], Result]) -> tuple[asyncio.Future[Result], Callable[[], None]]:
    """A future that the running loop waits for, and a function for the other thread to call: it does
    ``work`` and tells the loop the result, or the error."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def tell(result: Result | None, error: Exception | None) -> None:
        if answer.done():  # nobody waits for the result any more
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(cast(Result, result))

    def call() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as fault:  # noqa: BLE001  whatever it is, the caller gets it
            error = fault
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, result, error)

    return answer, call
