"""Makes worker processes log that they listen: `taskiq worker BROKER MODULE... worker_log`.

taskiq configures logging before it starts its worker processes. They have no logging if they are
not forked, as with Python 3.14 on Linux. Each imports this module, which changes nothing if logging
is configured.
"""

import logging

logging.basicConfig(level=logging.INFO)
