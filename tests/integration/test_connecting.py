"""What connections are called, and what errors about connecting name."""

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from taskiq_sa_pg import StorageError
from taskiq_sa_pg.database import Database as Connected
from taskiq_sa_pg.database import parse_dsn
from tests.conftest import Database
from tests.faults.servers import free_ports
from tests.integration.databases import each_owner

OWN_NAME = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
SECRET = "hunter2"

each_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


@asynccontextmanager
async def opened(dsn: Any, owner: str = "owned", **arguments: Any) -> AsyncIterator[Connected]:
    engine = create_async_engine(dsn) if owner == "borrowed" else None
    place = {"engine": engine} if engine else {"dsn": dsn}
    database = Connected(**place, retry_timeout=0, **arguments)
    await database.open()
    try:
        yield database
    finally:
        await database.close()
        if engine is not None:
            await engine.dispose()


async def name_of(database: Connected) -> str:
    [(name,)] = await database.fetch(text(OWN_NAME), {}, "read the name")
    return str(name)


async def name_of_listener(database: Connected) -> str:
    async with database.listening() as connection:
        if hasattr(connection, "fetchval"):
            return str(await connection.fetchval(OWN_NAME))
        [name] = await (await connection.execute(OWN_NAME)).fetchone()
        return str(name)


@each_driver
async def test_connections_of_the_library_are_named(driver: str, database: Database) -> None:
    dsn = database.dsn_of(driver)
    async with opened(dsn, listen_dsn=f"{dsn}&application_name=ears") as by_listen_dsn:
        assert await name_of(by_listen_dsn) == "taskiq_sa_pg"
        assert await name_of_listener(by_listen_dsn) == "ears"
    async with opened(lambda: dsn, listen_dsn=lambda: dsn) as by_callable:
        assert await name_of(by_callable) == "taskiq_sa_pg"
        assert await name_of_listener(by_callable) == "taskiq_sa_pg"
    async with opened(dsn) as alone:
        assert await name_of_listener(alone) == "taskiq_sa_pg"


@each_driver
async def test_a_name_of_the_users_overrides_that(
    driver: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = database.dsn_of(driver)
    arguments: dict[str, Any] = {"application_name": "b"}
    if driver == "asyncpg":
        arguments = {"server_settings": arguments}
    monkeypatch.setenv("PGAPPNAME", "a")
    async with opened(dsn) as by_environment:
        assert await name_of(by_environment) == "a"
    async with opened(dsn, engine_kwargs={"connect_args": arguments}) as by_arguments:
        assert await name_of(by_arguments) == "b"
    async with opened(f"{dsn}&application_name=c") as by_dsn:
        assert await name_of(by_dsn) == "c"


@each_driver
async def test_settings_of_the_users_keep_the_name(driver: str, database: Database) -> None:
    """asyncpg takes both as `server_settings`."""
    arguments: dict[str, Any] = {"connect_timeout": 20}
    if driver == "asyncpg":
        arguments = {"server_settings": {"timezone": "UTC"}}
    dsn = database.dsn_of(driver)
    async with opened(dsn, engine_kwargs={"connect_args": arguments}) as connected:
        assert await name_of(connected) == "taskiq_sa_pg"


@each_driver
async def test_connections_of_a_borrowed_engine_keep_their_name(
    driver: str, database: Database
) -> None:
    dsn = parse_dsn(database.direct_dsn.replace("postgresql:", f"postgresql+{driver}:"))
    async with opened(dsn.url.update_query_dict(_where(dsn)), "borrowed") as borrowed:
        assert await name_of(borrowed) == ""
        assert await name_of_listener(borrowed) == ""


def _where(address: Any) -> dict[str, str]:
    [(host, port)] = address.hosts
    return {"host": host, "port": str(port or 5432)}


@each_owner
@each_driver
async def test_a_refused_connection_names_host_and_port(driver: str, owner: str) -> None:
    [port] = free_ports(1)
    dsn = f"postgresql+{driver}://me:{SECRET}@localhost:{port}/d"
    async with opened(dsn, owner) as database:
        with pytest.raises(StorageError, match=rf"\(at localhost:{port}\)$") as caught:
            await name_of(database)
        assert database.place == f"localhost:{port}/d"
    assert SECRET not in str(caught.value)


@each_driver
async def test_several_hosts_are_all_named(driver: str) -> None:
    ports = free_ports(2)
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    async with opened(f"postgresql+{driver}://me:{SECRET}@{hosts}/d") as database:
        with pytest.raises(StorageError, match=rf"\(at {hosts}\)$") as caught:
            await name_of(database)
    assert SECRET not in str(caught.value)


@each_owner
@each_driver
async def test_an_unknown_host_is_named(driver: str, owner: str) -> None:
    async with opened(f"postgresql+{driver}://me:{SECRET}@nowhere.invalid/d", owner) as database:
        with pytest.raises(StorageError, match=r"\(at nowhere.invalid:5432\)$"):
            await name_of(database)


@each_owner
@each_driver
async def test_a_socket_without_a_server_is_named(driver: str, owner: str, tmp_path: Any) -> None:
    dsn = f"postgresql+{driver}://me:{SECRET}@/d?host={tmp_path}"
    async with opened(dsn, owner) as database:
        with pytest.raises(StorageError, match=rf"\(at {re.escape(str(tmp_path))}:5432\)$"):
            await name_of(database)


@each_owner
@each_driver
async def test_an_unknown_database_names_the_server_and_the_remedy(
    driver: str, owner: str, database: Database
) -> None:
    address = parse_dsn(database.direct_dsn)
    where = _where(address)
    dsn = address.url.set(drivername=f"postgresql+{driver}", database="no_such_database")
    said = rf'"no_such_database" does not exist.* \(at {where["host"]}:{where["port"]}\); create '
    async with opened(dsn.update_query_dict(where), owner) as connected:
        with pytest.raises(StorageError, match=said):
            await name_of(connected)


@each_driver
async def test_the_place_follows_the_dsns_of_a_callable(driver: str, database: Database) -> None:
    [port] = free_ports(1)
    dsns = [f"postgresql+{driver}://me:{SECRET}@localhost:{port}/d", database.dsn_of(driver)]
    async with opened(lambda: dsns[0]) as connected:
        with pytest.raises(StorageError, match=rf"\(at localhost:{port}\)$"):
            await name_of(connected)
        assert connected.place == f"localhost:{port}/d"
        del dsns[0]
        await name_of(connected)
        assert connected.place == Connected(database.dsn_of(driver)).place


@each_driver
async def test_a_server_that_does_not_answer_is_named(driver: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with opened(
            f"postgresql+{driver}://me:{SECRET}@127.0.0.1:{port}/d", command_timeout=0.05
        ) as database:
            with pytest.raises(StorageError, match=rf"not answer in time \(at 127.0.0.1:{port}\)"):
                await name_of(database)
