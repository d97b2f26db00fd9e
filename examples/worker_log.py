"""Has worker processes log that they listen: `taskiq worker BROKER MODULE... worker_log`.

taskiq sets up the log before it starts them, and leaves out those that are not forked, as
Python 3.14's on Linux. Each imports this module, which changes nothing where there is a log.
"""

import logging

logging.basicConfig(level=logging.INFO)
