"""The tables: results, progress and status.

Revision ID: 0001
Revises:
"""

from alembic import op

from taskiq_sa_pg import schema
from taskiq_sa_pg.schema.migrate import environment_options

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables."""
    schema.upgrade(op, version=1, **environment_options())


def downgrade() -> None:
    """Drops the tables."""
    schema.downgrade(op, version=1, **environment_options())
