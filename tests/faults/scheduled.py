"""What the scheduler processes of test_schedules.py run."""

import os

from taskiq import TaskiqScheduler

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyScheduleSource

broker = SQLAlchemyBroker(os.environ["SCHEDULED_DSN"], check_schema="off")
scheduler = TaskiqScheduler(broker, [SQLAlchemyScheduleSource(broker)])


@broker.task("tick", schedule=[{"interval": 1, "schedule_id": "tick"}])
async def tick() -> None: ...
