"""The tasks: their queue, their results and their progress.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from taskiq_sa_pg import schema

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema.upgrade(op, version=1, field_for_task_id="Uuid", field_for_payload="Jsonb")
    op.create_table(
        "taskiq_messages",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("task_name", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("labels", postgresql.JSONB(), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_taskiq_messages")),
    )


def downgrade() -> None:
    op.drop_table("taskiq_messages")
    schema.downgrade(op, version=1, field_for_task_id="Uuid", field_for_payload="Jsonb")
