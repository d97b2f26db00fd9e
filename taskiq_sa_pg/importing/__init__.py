"""Imports results and progress of taskiq-postgres into the tables of a backend.

    report = await import_results(backend, "old_results", serializer=PickleSerializer())

The import does not change the old table and never overwrites existing rows. You can interrupt it
at any time, repeat it, and run it while workers store results in both tables.
"""

from taskiq_sa_pg.importing.copy import ImportReport as ImportReport
from taskiq_sa_pg.importing.copy import Unreadable as Unreadable
from taskiq_sa_pg.importing.copy import count_rows as count_rows
from taskiq_sa_pg.importing.copy import import_results as import_results
from taskiq_sa_pg.importing.queue import QueueImportReport as QueueImportReport
from taskiq_sa_pg.importing.queue import import_queue as import_queue
