"""An application with an Alembic history of its own, in a folder, as `alembic init` makes it."""

import asyncio
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config

from tests.commands import run_alembic
from tests.conftest import Database

MODELS = """
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    StatusMixin,
    TableConfig,
    WorkerMixin,
    build_models,
)

class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(column_0_label)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
        }
    )

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(index=True)
"""

# As autogenerate makes it.
ORDERS_REVISION = "0a_orders.py"
ORDERS = """
import sqlalchemy as sa
from alembic import op

revision = "0a"
down_revision = None

def upgrade():
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("item", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orders")),
    )
    op.create_index(op.f("ix_orders_item"), "orders", ["item"], unique=False)

def downgrade():
    op.drop_index(op.f("ix_orders_item"), table_name="orders")
    op.drop_table("orders")
"""

ENVIRONMENT = """
import runpy
from pathlib import Path
from taskiq_sa_pg import schema
# Afresh, because the commands of a test share a process.
models = runpy.run_path(str(Path(__file__).parents[1] / "models.py"))
target_metadata = models["Base"].metadata
options = dict({options})
"""


IMPORT = "from taskiq_sa_pg import schema\n"


@dataclass
class Application:
    """Its folder, and the database that it is configured for.

    Attributes:
        template: Alembic's: "generic", which gets psycopg, or "async", which gets asyncpg.
        options: Further arguments of context.configure() in its env.py, as Python.
    """

    folder: Path
    database: Database
    template: str = "generic"
    options: str = ""
    _env: str = field(default="", init=False)

    def __post_init__(self) -> None:
        command.init(
            Config(self.ini, stdout=io.StringIO()),
            str(self.folder / "migrations"),
            template=self.template,
        )
        (self.folder / "migrations/versions" / ORDERS_REVISION).write_text(ORDERS)
        # It would set up the logging of the tests.
        self.ini.write_text(self.ini.read_text().partition("[loggers]")[0])
        self._env = (self.folder / "migrations/env.py").read_text()
        self.use(self.database)
        self.set_models("")

    @property
    def ini(self) -> Path:
        return self.folder / "alembic.ini"

    @property
    def revisions(self) -> list[Path]:
        return sorted((self.folder / "migrations/versions").glob("*.py"))

    def set_models(self, source: str) -> None:
        """Models beside the orders."""
        (self.folder / "models.py").write_text(MODELS + source)

    def use(self, database: Database, options: str | None = None) -> None:
        """Goes to another database, or has other arguments for context.configure()."""
        self.database = database
        self.options = self.options if options is None else options
        driver = "psycopg" if self.template == "generic" else "asyncpg"
        url = database.server_dsn.replace("postgresql://", f"postgresql+{driver}://", 1)
        ini = re.sub(
            r"^sqlalchemy.url = .*",
            lambda _: f"sqlalchemy.url = {url.replace('%', '%%')}",
            self.ini.read_text(),
            flags=re.MULTILINE,
        )
        self.ini.write_text(ini)
        place = {
            "generic": f'{{"options": "-c search_path={database.schema}"}}',
            "async": f'{{"server_settings": {{"search_path": "{database.schema}"}}}}',
        }[self.template]
        env = self._env
        for old, new in (
            ("    fileConfig(config.config_file_name)\n", "    pass\n"),
            ("target_metadata = None\n", ENVIRONMENT.format(options=self.options)),
            ("poolclass=pool.NullPool,", f"poolclass=pool.NullPool, connect_args={place},"),
        ):
            assert old in env
            env = env.replace(old, new)
        env, count = re.subn(r"context\.configure\(", "context.configure(**options, ", env)
        assert count == 2
        (self.folder / "migrations/env.py").write_text(env)

    async def alembic(self, *arguments: str) -> str:
        """Runs a command in this process, and returns what it prints.

        Raises:
            CommandError: It fails.
        """
        return await asyncio.to_thread(run_alembic, *arguments, ini=self.ini)

    async def autogenerate(self, message: str) -> str:
        """Makes a revision, and returns what its upgrade() and downgrade() say."""
        before = set(self.revisions)
        await self.alembic("revision", "--autogenerate", "-m", message)
        [revision] = set(self.revisions) - before
        return revision.read_text()

    async def write_revision(self, upgrade: str, downgrade: str) -> None:
        """Makes a revision by hand, of one line each."""
        before = set(self.revisions)
        await self.alembic("revision", "-m", "by hand")
        [revision] = set(self.revisions) - before
        text = revision.read_text()
        for line in (upgrade, downgrade):
            assert "    pass\n" in text
            text = text.replace("    pass\n", f"    {line}\n", 1)
        text = text.replace("from alembic import op\n", f"from alembic import op\n{IMPORT}")
        revision.write_text(text)


async def execute_script(database: Database, script: str) -> None:
    connection = await asyncpg.connect(database.dsn)
    try:
        await connection.execute(script)
    finally:
        await connection.close()


def operations_in(revision: str) -> dict[str, int]:
    """How often a revision calls which operation."""
    called = re.findall(r"\bop\.(\w+)\(", revision)
    return {name: called.count(name) for name in called if name != "f"}
