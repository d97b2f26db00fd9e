"""Helpers for the tests of applications."""

from taskiq_sa_pg.broker import InProcessBroker

__all__ = ["InProcessBroker"]
