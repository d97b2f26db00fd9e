"""LISTEN/NOTIFY, and who waits for what."""

from taskiq_sa_pg.waiting.listener import Listener, end
from taskiq_sa_pg.waiting.notifier import Notifier
from taskiq_sa_pg.waiting.waiters import Subscription, Topic, Waiters

__all__ = ["Listener", "Notifier", "Subscription", "Topic", "Waiters", "end"]
