"""The columns that TaskMetadataMiddleware fills.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

from taskiq_sa_pg import schema
from taskiq_sa_pg.provisioning import environment_options

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns, of NULLs."""
    schema.upgrade(op, version=2, **environment_options())


def downgrade() -> None:
    """Drops the columns with what is in them."""
    schema.downgrade(op, version=2, **environment_options())
