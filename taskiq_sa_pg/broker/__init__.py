"""The broker: tasks in a table of the database, next to their results."""

from taskiq_sa_pg.broker.admin import ParkedTask as ParkedTask
from taskiq_sa_pg.broker.admin import QueueCount as QueueCount
from taskiq_sa_pg.broker.broker import SQLAlchemyBroker as SQLAlchemyBroker
from taskiq_sa_pg.broker.schedule_info import ScheduleInfo as ScheduleInfo
from taskiq_sa_pg.broker.schedules import SQLAlchemyScheduleSource as SQLAlchemyScheduleSource
from taskiq_sa_pg.broker.sender import row_of as row_of
from taskiq_sa_pg.broker.session import SessionBroker as SessionBroker
from taskiq_sa_pg.broker.settings import QueueSettings as QueueSettings
from taskiq_sa_pg.broker.testing import InProcessBroker as InProcessBroker
from taskiq_sa_pg.broker.ticks import is_for_tick as is_for_tick
