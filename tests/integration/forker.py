"""A script that never closes its SyncResults, as is its child, which is interrupted as it waits."""

import gc
import json
import os
import signal
import sys
import threading
import time
import uuid
from typing import Any

from taskiq import TaskiqResult

from taskiq_sa_pg import SQLAlchemyResultBackend, build_models
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.sync import SyncResults

dsn, listen_dsn, table_name = sys.argv[1:]
backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
    engine=make_engine(dsn),
    listen_dsn=listen_dsn,
    models=build_models(table_name=table_name),
    check_schema="off",
)
results = SyncResults(backend)


def interrupt() -> None:
    while not any(each.is_awaited for each in backend.runtime.waiters.subscriptions):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


task_id = uuid.uuid4().hex
result = TaskiqResult[Any](is_err=False, return_value=1, execution_time=0.1)
results.call(backend.set_result, task_id, result)
child = os.fork()
if child == 0:
    threading.Thread(target=interrupt).start()
    try:
        results.wait_result(uuid.uuid4().hex)
    finally:
        gc.collect()  # finds nothing that would disturb the parent
        print(results.get_result(task_id).return_value, flush=True)
_, status = os.waitpid(child, 0)
value = results.wait_result(task_id).return_value
retries = backend.stats().retries
print(json.dumps([os.waitstatus_to_exitcode(status), value, retries]))
