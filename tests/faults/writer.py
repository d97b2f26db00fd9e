"""Stores results from many callers, and prints the id of each that was stored, until killed."""

import asyncio
import itertools
import signal
import sys

from taskiq import TaskiqResult

from taskiq_sa_pg import SQLAlchemyResultBackend


async def main(dsn: str) -> None:
    backend: SQLAlchemyResultBackend[int] = SQLAlchemyResultBackend(dsn)
    await backend.startup()
    is_ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_ending.set)
    numbers = itertools.count()

    async def caller() -> None:
        while not is_ending.is_set():
            number = next(numbers)
            result = TaskiqResult(is_err=False, return_value=number, execution_time=0.1)
            await backend.set_result(str(number), result)
            print(number, flush=True)

    # More than go into the statements that are under way, so that some wait for theirs.
    callers = [asyncio.ensure_future(caller()) for _ in range(2000)]
    await is_ending.wait()
    # What was accepted until now is stored, and its callers hear of it.
    await backend.shutdown()
    await asyncio.gather(*callers)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
