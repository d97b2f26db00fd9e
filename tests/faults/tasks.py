"""What the worker processes of the faults run: the broker's server is not the results'."""

import os
from pathlib import Path
from typing import Any

from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend


class SavedTasks(TaskiqMiddleware):
    """Writes down the ids of tasks whose result is stored, which are acknowledged next."""

    def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        del result
        with Path(os.environ["FAULTS_SAVED"]).open("a") as saved:
            saved.write(f"{message.task_id}\n")


backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(os.environ["FAULTS_RESULTS_DSN"])
broker = (
    SQLAlchemyBroker(os.environ["FAULTS_BROKER_DSN"], run_migrations=True)
    .with_result_backend(backend)
    .with_middlewares(SavedTasks())
)


@broker.task
async def double(number: int) -> int:
    return 2 * number
