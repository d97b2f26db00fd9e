"""The table of tasks that have not finished.

Revision ID: 0003
Revises: 0002
"""

from alembic import op

from taskiq_sa_pg import schema
from taskiq_sa_pg.provisioning import environment_options

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table."""
    schema.upgrade(op, version=3, **environment_options())


def downgrade() -> None:
    """Drops the table with what is in it."""
    schema.downgrade(op, version=3, **environment_options())
