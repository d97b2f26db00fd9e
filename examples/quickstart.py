"""Sends a task and waits for its result.

TASKIQ_SA_PG_DSN names the database. Start a worker with `taskiq worker quickstart:broker`, then run
`python quickstart.py`.
"""

import asyncio
import os

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend

dsn = os.environ["TASKIQ_SA_PG_DSN"]
broker = SQLAlchemyBroker(dsn).with_result_backend(SQLAlchemyResultBackend(dsn))


@broker.task
async def solve_all_problems() -> int:
    await asyncio.sleep(0.1)
    return 42


async def main() -> None:
    await broker.startup()
    task = await solve_all_problems.kiq()
    result = await task.wait_result(timeout=30)
    print(result.return_value)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
