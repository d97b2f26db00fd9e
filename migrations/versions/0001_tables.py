"""The tables: those of results, or the broker's.

Revision ID: 0001
Revises:
"""

from alembic import op

from taskiq_sa_pg.models import TableConfig
from taskiq_sa_pg.schema import Family

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade(config: TableConfig, family: Family) -> None:
    """Creates the tables of the family."""
    family.step(1).upgrade(op, config, family.table_names(config))


def downgrade(config: TableConfig, family: Family) -> None:
    """Drops the tables of the family."""
    family.step(1).downgrade(op, config)
