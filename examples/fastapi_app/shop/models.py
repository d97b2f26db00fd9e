"""All tables of the application, in one metadata, so that Alembic knows them all."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import DateTime, MetaData, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from taskiq_sa_pg import build_models


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[UUID] = mapped_column(unique=True)
    customer: Mapped[str]
    quantity: Mapped[int]
    ordered_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


# The tables of results, progress and the queue. Values are JSON, for the browser and for SQL.
task_models = build_models(
    field_for_task_id="Uuid", field_for_payload="Jsonb", metadata=Base.metadata, queue=True
)
Result = task_models.Result
