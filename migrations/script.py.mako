"""${message}.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from alembic import op

from taskiq_sa_pg.models import TableConfig
from taskiq_sa_pg.schema import Family

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(config: TableConfig, family: Family) -> None:
    """Upgrades the tables of the family by one version."""
    family.step(${int(up_revision)}).upgrade(op, config, family.table_names(config))


def downgrade(config: TableConfig, family: Family) -> None:
    """Downgrades the tables of the family by one version."""
    family.step(${int(up_revision)}).downgrade(op, config)
