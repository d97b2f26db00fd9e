"""The Alembic environment of taskiq_sa_pg; the code is in taskiq_sa_pg.schema.migrate."""

from logging.config import fileConfig

from alembic import context

from taskiq_sa_pg.schema.migrate import run_environment

config = context.config
if config.config_file_name is not None and config.file_config.has_section("loggers"):
    fileConfig(config.config_file_name, disable_existing_loggers=False)

run_environment()
