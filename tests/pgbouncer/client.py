"""One of several processes on the same tables: asks for results, or forgets others of its own."""

import asyncio
import sys

from taskiq_sa_pg import SQLAlchemyResultBackend


async def main(dsn: str, what: str, task_ids: list[str]) -> None:
    backend: SQLAlchemyResultBackend[int] = SQLAlchemyResultBackend(
        dsn, check_schema="off", notify=False
    )
    await backend.startup()
    for number in range(100):
        if what == "ask":
            asked = [backend.is_result_ready(task_id) for task_id in task_ids]
            assert all(await asyncio.gather(*asked))
        else:
            assert await backend.forget([f"of its own {number}"]) == 0
    await backend.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
