"""Imports the table `old` in small batches, and prints how far it is, until killed."""

import asyncio
import sys

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.importing import ImportReport, import_results


def tell(report: ImportReport) -> None:
    print(report.rows, flush=True)


async def main(dsn: str) -> None:
    backend: SQLAlchemyResultBackend[int] = SQLAlchemyResultBackend(dsn)
    await backend.startup()
    await import_results(backend, "old", batch_size=10, on_batch=tell)
    await backend.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
