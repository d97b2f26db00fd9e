"""The tables' schema: its versions for a history of your own, and the check of a database."""

from taskiq_sa_pg.schema.catalogue import OLD_PAYLOAD_TYPE as OLD_PAYLOAD_TYPE
from taskiq_sa_pg.schema.catalogue import OLD_TASK_ID_TYPES as OLD_TASK_ID_TYPES
from taskiq_sa_pg.schema.catalogue import describe_columns as describe_columns
from taskiq_sa_pg.schema.catalogue import is_of_taskiq_postgres as is_of_taskiq_postgres
from taskiq_sa_pg.schema.catalogue import select_sizes as select_sizes
from taskiq_sa_pg.schema.check import check as check
from taskiq_sa_pg.schema.check import check_queue as check_queue
from taskiq_sa_pg.schema.families import QUEUE as QUEUE
from taskiq_sa_pg.schema.families import RESULTS as RESULTS
from taskiq_sa_pg.schema.families import Family as Family
from taskiq_sa_pg.schema.families import chosen_families as chosen_families
from taskiq_sa_pg.schema.prepare import SchemaCheck as SchemaCheck
from taskiq_sa_pg.schema.prepare import check_schema_check as check_schema_check
from taskiq_sa_pg.schema.prepare import prepare as prepare
from taskiq_sa_pg.schema.quiet import quiet_alembic as quiet_alembic
from taskiq_sa_pg.schema.revisions import IncludeName as IncludeName
from taskiq_sa_pg.schema.revisions import downgrade as downgrade
from taskiq_sa_pg.schema.revisions import downgrade_queue as downgrade_queue
from taskiq_sa_pg.schema.revisions import include_name as include_name
from taskiq_sa_pg.schema.revisions import upgrade as upgrade
from taskiq_sa_pg.schema.revisions import upgrade_queue as upgrade_queue
from taskiq_sa_pg.schema.steps import LATEST_VERSION as LATEST_VERSION
