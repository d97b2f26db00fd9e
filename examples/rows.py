"""Prints slow successes: queries results as rows, with the ORM."""

import asyncio
import os

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from taskiq_sa_pg import build_models
from taskiq_sa_pg.database import make_engine

models = build_models()
Result = models.Result


async def main() -> None:
    engine = make_engine(os.environ["TASKIQ_SA_PG_DSN"])
    slow_successes = (
        select(Result)
        .where(Result.is_err.is_(False), Result.execution_time > 1)
        .order_by(Result.finished_at)
    )
    async with AsyncSession(engine) as session:
        for result in await session.scalars(slow_successes):
            print(
                f"{result!r} took {result.execution_time} s, done at {result.finished_at:%H:%M:%S}"
            )
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
