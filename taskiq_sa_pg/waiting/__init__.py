"""Waiting for results and progress with LISTEN/NOTIFY."""

from taskiq_sa_pg.waiting.listener import Listener as Listener
from taskiq_sa_pg.waiting.notifier import Notifier as Notifier
from taskiq_sa_pg.waiting.waiters import Subscription as Subscription
from taskiq_sa_pg.waiting.waiters import Topic as Topic
from taskiq_sa_pg.waiting.waiters import Waiters as Waiters
