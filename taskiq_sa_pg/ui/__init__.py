"""The dashboard (extra `ui`): pages about tasks, which you mount into an application."""

try:
    import jinja2 as _jinja2  # noqa: F401 - only to check that it is installed
    import starlette as _starlette  # noqa: F401 - as above
except ModuleNotFoundError as exc:
    raise ImportError(
        "taskiq_sa_pg.ui needs Starlette and Jinja2: pip install 'taskiq-sa-pg[ui]'"
    ) from exc

from taskiq_sa_pg.ui.app import dashboard as dashboard
from taskiq_sa_pg.ui.security import Authorize as Authorize
from taskiq_sa_pg.ui.security import Permission as Permission

__all__ = ["Authorize", "Permission", "dashboard"]
