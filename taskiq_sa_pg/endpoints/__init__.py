"""HTTP endpoints for tasks, shared by Starlette and FastAPI."""

from taskiq_sa_pg.endpoints.answers import Problem as Problem
from taskiq_sa_pg.endpoints.answers import Progress as Progress
from taskiq_sa_pg.endpoints.answers import TaskAnswer as TaskAnswer
from taskiq_sa_pg.endpoints.answers import TaskError as TaskError
from taskiq_sa_pg.endpoints.answers import TaskPage as TaskPage
from taskiq_sa_pg.endpoints.answers import TaskQuery as TaskQuery
from taskiq_sa_pg.endpoints.answers import TaskSummary as TaskSummary
from taskiq_sa_pg.endpoints.endpoints import MayList as MayList
from taskiq_sa_pg.endpoints.endpoints import MaySee as MaySee
from taskiq_sa_pg.endpoints.endpoints import TaskEndpoints as TaskEndpoints
from taskiq_sa_pg.endpoints.endpoints import Unknown as Unknown
from taskiq_sa_pg.endpoints.events import EventResponse as EventResponse
from taskiq_sa_pg.endpoints.events import encode_event as encode_event
from taskiq_sa_pg.endpoints.events import keep_open as keep_open
