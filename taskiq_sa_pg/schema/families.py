"""The families of tables: each has its steps, its version table and its user."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

import sqlalchemy as sa

from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.models import TableConfig, build_models
from taskiq_sa_pg.schema.steps import LATEST_VERSION, QUEUE_STEPS, RESULT_STEPS, Step


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Tables that are created together and have their own version table.

    All families share the version numbers, and so one chain of revisions.

    Attributes:
        user: The component that uses the tables, for messages.
        choice: The value of `-x queue=` that selects only this family.
        steps: The steps by version.
        table_names: The tables' names in a configuration, the most important one first.
        version_table_name: The name of their version table.
    """

    user: str
    choice: str
    steps: Mapping[int, Step]
    table_names: Callable[[TableConfig], tuple[str, ...]]
    version_table_name: Callable[[TableConfig], str]

    def step(self, version: int) -> Step:
        """The step of a version.

        Raises:
            ConfigurationError: The version does not exist.
        """
        if version not in self.steps:
            raise ConfigurationError(
                f"there is no version {version!r} of the schema; the latest is {LATEST_VERSION}"
            )
        return self.steps[version]

    def place(self, config: TableConfig) -> str:
        """The first table's name, for messages."""
        return config.qualified(self.table_names(config)[0])

    def metadata(self, config: TableConfig) -> sa.MetaData:
        """The tables of this family, without an application's additions."""
        metadata = build_models(**asdict(config), queue=True).metadata
        for table in list(metadata.tables.values()):
            if table.name not in self.table_names(config):
                metadata.remove(table)
        return metadata


RESULTS: Final = Family(
    user="result backend",
    choice="false",
    steps=RESULT_STEPS,
    table_names=lambda config: config.table_names,
    version_table_name=lambda config: config.version_table_name,
)
QUEUE: Final = Family(
    user="broker",
    choice="only",
    steps=QUEUE_STEPS,
    table_names=lambda config: config.queue_table_names,
    version_table_name=lambda config: config.queue_version_table_name,
)

# The values of `-x queue=` and TASKIQ_SA_PG_QUEUE; the first is the default.
_CHOICES: Final = {
    "false": (RESULTS,),
    "true": (RESULTS, QUEUE),
    "only": (QUEUE,),
}


def chosen_families(choice: str) -> tuple[Family, ...]:
    """The families for a value of `-x queue=` or TASKIQ_SA_PG_QUEUE; empty is the default.

    Raises:
        ConfigurationError: The value does not exist.
    """
    families = _CHOICES.get(choice or RESULTS.choice)
    if families is None:
        choices = ", ".join(f'"{each}"' for each in _CHOICES)
        raise ConfigurationError(f"queue must be one of {choices}, not {choice!r}")
    return families
