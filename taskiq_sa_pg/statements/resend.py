"""The recorded parts of a task's message."""

from typing import Any

from sqlalchemy import Select, select

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StoredMessage
from taskiq_sa_pg.statements.select import is_asked_for, is_live, readable


def select_messages(models: Models) -> Select[Any]:
    """The recorded messages of the `task_ids`' results, as StoredMessage."""
    results = models.results_table
    columns = readable(results, StoredMessage._fields)
    return select(*columns).where(is_asked_for(results), is_live(results))
