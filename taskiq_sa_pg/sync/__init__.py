"""Results for code without an event loop: Flask, Django, scripts."""

from taskiq_sa_pg.sync.results import SyncResults as SyncResults

__all__ = ["SyncResults"]
