"""Configures logging in worker processes: `taskiq worker BROKER MODULE... worker_log`.

taskiq configures logging before it starts its worker processes. Processes that are not forked, as
with Python 3.14 on Linux, do not inherit that. Each imports this module, which changes nothing if
logging is configured.
"""

import logging

logging.basicConfig(level=logging.INFO)
