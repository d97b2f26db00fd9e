"""${message}.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from alembic import op

from taskiq_sa_pg import schema
from taskiq_sa_pg.schema.migrate import environment_options

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Takes the tables one version up."""
    schema.upgrade(op, version=${int(up_revision)}, **environment_options())


def downgrade() -> None:
    """Takes the tables one version down."""
    schema.downgrade(op, version=${int(up_revision)}, **environment_options())
