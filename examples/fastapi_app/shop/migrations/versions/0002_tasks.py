"""The tasks: their queue, their results and their progress.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

from taskiq_sa_pg import schema

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema.upgrade(op, version=1, field_for_task_id="Uuid", field_for_payload="Jsonb")
    schema.upgrade_queue(op, version=1, field_for_task_id="Uuid")


def downgrade() -> None:
    schema.downgrade_queue(op, version=1, field_for_task_id="Uuid")
    schema.downgrade(op, version=1, field_for_task_id="Uuid", field_for_payload="Jsonb")
