"""Django's settings, which a process can make once: for the tests and for a page's code."""

import django
from django.conf import settings


def configure_django() -> None:
    """A site with a database in memory, which each thread has for itself."""
    if not settings.configured:
        database = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        settings.configure(DATABASES={"default": database}, ALLOWED_HOSTS=["*"])
        django.setup()
