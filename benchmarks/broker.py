"""`python -m benchmarks.broker [--quick]`: sending tasks, and having workers execute them.

The full run replaces BROKER.md beside this file; a quick one leaves its own in build/bench/.
"""

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, Identity, LargeBinary, MetaData, Text, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from taskiq import AsyncBroker

from benchmarks.broker_app import CONTENDERS, OURS, PEER, BrokerContender, make_broker
from benchmarks.environment import read_environment
from benchmarks.markdown import number, table
from benchmarks.measure import Sample, measure, medians, percentiles
from benchmarks.servers import DURABLE, Servers, connected, redis_server
from taskiq_sa_pg import SQLAlchemyBroker
from taskiq_sa_pg.embedded import postgres

DIRECTORY: Final = Path(__file__).parent
SENDERS: Final = (1, 100)
PROCESSES: Final = (1, 2)
CLIENTS: Final = (8, 32, 64)
_TIMEOUT: Final = 120

_numbers = itertools.count()
Rows = list[list[str]]


class Plan(NamedTuple):
    """How much is measured; `tasks` are sent to workers, `seconds` a closed loop takes."""

    rounds: int = 3
    seconds: float = 0.5
    tasks: int = 3_000
    starts: int = 40


QUICK: Final = Plan(rounds=1, seconds=0.2, tasks=500, starts=5)

PLAIN: Final = "the order alone"
BARE: Final = "and the INSERT of a row"
ENQUEUED: Final = "and a task"
_Transact = Callable[[AsyncSession], Any]


class Base(DeclarativeBase):
    metadata = MetaData()


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    customer: Mapped[str]


class Row(Base):
    """As large as a task in the queue."""

    __tablename__ = "rows"
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    payload: Mapped[bytes] = mapped_column(LargeBinary)


async def measure_senders(servers: Servers, plan: Plan) -> dict[tuple[Any, int], list[Sample]]:
    """Senders who send again as soon as their last task was taken; no worker is there."""
    samples: defaultdict[tuple[Any, int], list[Sample]] = defaultdict(list)
    for number_of_round in range(plan.rounds):
        for contender in _rotated(_at_hand(servers), number_of_round):
            async with _client(contender, servers) as (broker, _):
                task = broker.find_task("begin")
                assert task is not None
                for senders in SENDERS:
                    call = lambda _: task.kiq()  # noqa: E731, B023
                    sample = await measure(call, itertools.repeat(""), senders, plan.seconds)
                    samples[contender, senders].append(sample)
    return dict(samples)


async def measure_tasks(servers: Servers, plan: Plan) -> dict[tuple[Any, int], list[float]]:
    """Tasks a second, from the first that is sent to the last result, with 100 senders."""
    rates: defaultdict[tuple[Any, int], list[float]] = defaultdict(list)
    for number_of_round in range(plan.rounds):
        for processes in PROCESSES:
            for contender in _rotated(_at_hand(servers), number_of_round):
                async with _client(contender, servers) as (broker, environment):
                    with workers(processes, environment):
                        rate = await _send_and_wait(broker, contender, servers, environment, plan)
                        rates[contender, processes].append(rate)
    return dict(rates)


async def _send_and_wait(
    broker: AsyncBroker,
    contender: BrokerContender,
    servers: Servers,
    environment: Mapping[str, str],
    plan: Plan,
) -> float:
    task = broker.find_task("begin")
    assert task is not None
    # All processes have to be there.
    first = [await task.kiq() for _ in range(20)]
    _ = await asyncio.gather(*[each.wait_result(timeout=_TIMEOUT) for each in first])
    began = time.monotonic()
    left = iter(range(plan.tasks))

    async def send() -> None:
        for _ in left:
            _ = await task.kiq()

    _ = await asyncio.gather(*[send() for _ in range(100)])
    while await _count(contender, servers, environment) < plan.tasks + len(first):
        if time.monotonic() > began + _TIMEOUT:
            raise TimeoutError(f"{contender.name} has not executed all tasks")
        await asyncio.sleep(0.02)
    return plan.tasks / (time.monotonic() - began)


async def _count(
    contender: BrokerContender, servers: Servers, environment: Mapping[str, str]
) -> int:
    """How many results there are."""
    if contender.uses_redis:
        assert servers.redis is not None
        return int(await servers.redis.connection.dbsize()) - 1  # the stream
    name = contender.results_of(environment["BENCH_QUEUE"])
    count: int = await servers.postgres.connection.fetchval(f"SELECT count(*) FROM {name}")  # noqa: S608
    return count


async def measure_starts(servers: Servers, plan: Plan) -> dict[Any, tuple[float, float]]:
    """Milliseconds from the return of kiq(), or from a commit, to the start in an idle worker."""
    latencies: defaultdict[Any, list[float]] = defaultdict(list)
    for contender in _at_hand(servers):
        async with _client(contender, servers) as (broker, environment):
            with workers(1, environment):
                await _measure_starts(broker, contender.name, latencies, plan)
                if isinstance(broker, SQLAlchemyBroker):
                    engine = create_async_engine(_sqlalchemy_url(servers))
                    async with AsyncSession(engine) as session:
                        name = f"{contender.name}, in a session"
                        await _measure_starts(broker, name, latencies, plan, session)
                    await engine.dispose()
    return {name: percentiles(values) for name, values in latencies.items()}


async def _measure_starts(
    broker: AsyncBroker,
    name: str,
    latencies: dict[Any, list[float]],
    plan: Plan,
    session: AsyncSession | None = None,
) -> None:
    task = broker.find_task("begin")
    assert task is not None
    for attempt in range(plan.starts + 1):
        if session is None:
            sent = await task.kiq()
        else:
            assert isinstance(broker, SQLAlchemyBroker)
            sent = await broker.in_session(session).kiq(task)
            await session.commit()
        before = time.monotonic()
        result = await sent.wait_result(timeout=_TIMEOUT, check_interval=0.05)
        if attempt:  # not while the worker starts
            latencies[name].append((result.return_value - before) * 1000)


async def measure_transactions(servers: Servers, plan: Plan) -> dict[tuple[str, int], list[float]]:
    """Transactions a second of an application, by what is in them and by clients."""
    rates: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    async with _client(OURS, servers) as (broker, _):
        assert isinstance(broker, SQLAlchemyBroker)
        for clients in CLIENTS:
            engine = create_async_engine(_sqlalchemy_url(servers), pool_size=clients)
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
                await connection.run_sync(Base.metadata.create_all)
            session_of = async_sessionmaker(engine)
            kinds = _kinds(broker)
            for number_of_round in range(plan.rounds):
                for kind in _rotated(list(kinds), number_of_round):
                    work = kinds[kind]

                    async def transact(_: str, work: _Transact = work) -> None:
                        async with session_of.begin() as session:  # noqa: B023
                            session.add(Order(customer="somebody"))
                            await work(session)

                    sample = await measure(transact, itertools.repeat(""), clients, plan.seconds)
                    rates[kind, clients].append(sample.per_second)
            await engine.dispose()
    return dict(rates)


def _kinds(broker: SQLAlchemyBroker) -> dict[str, _Transact]:
    task = broker.find_task("begin")
    assert task is not None

    async def nothing(session: AsyncSession) -> None:
        await session.flush()

    async def bare(session: AsyncSession) -> None:
        key = broker.id_generator()
        values = {"key": key, "name": "begin", "payload": b"x" * 130}
        _ = await session.execute(insert(Row.__table__), values)  # type: ignore[arg-type]  # a Table

    async def enqueue(session: AsyncSession) -> None:
        _ = await broker.in_session(session).kiq(task)

    return {PLAIN: nothing, BARE: bare, ENQUEUED: enqueue}


@asynccontextmanager
async def _client(
    contender: BrokerContender, servers: Servers
) -> AsyncIterator[tuple[AsyncBroker, dict[str, str]]]:
    """A broker that sends, and the environment of workers that serve it; nothing is stored yet."""
    if servers.redis:
        await servers.redis.connection.flushall()
    environment = {
        "BENCH_BROKER": contender.name,
        "BENCH_ADDRESS": servers.redis.address
        if contender.uses_redis and servers.redis
        else servers.postgres.address,
        "BENCH_QUEUE": f"bench_{next(_numbers)}",
    }
    broker = make_broker(*environment.values())
    await broker.startup()
    try:
        yield broker, environment
    finally:
        await broker.shutdown()


@contextmanager
def workers(processes: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Real worker processes; they listen when the block is entered."""
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.broker_app:broker"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--workers", str(processes)],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + _TIMEOUT
            while _read(log).count(b"Listening started") < processes:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the workers did not start: {_read(log).decode()}")
                time.sleep(0.05)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(log: Any) -> bytes:
    return os.pread(log.fileno(), 1_000_000, 0)


def _sqlalchemy_url(servers: Servers) -> str:
    return servers.postgres.address.replace("postgresql://", "postgresql+asyncpg://", 1)


def _at_hand(servers: Servers) -> list[BrokerContender]:
    return [each for each in CONTENDERS if servers.redis or not each.uses_redis]


def _rotated(items: Sequence[Any], by: int) -> list[Any]:
    first = by % len(items)
    return [*items[first:], *items[:first]]


async def measure_all(dsn: str, redis_url: str | None, plan: Plan) -> str:
    """The report."""
    async with connected(dsn, redis_url) as servers:
        environment = await read_environment(servers)
        print("senders", flush=True)
        senders = await measure_senders(servers, plan)
        print("workers", flush=True)
        tasks = await measure_tasks(servers, plan)
        print("starts", flush=True)
        starts = await measure_starts(servers, plan)
        print("transactions", flush=True)
        transactions = await measure_transactions(servers, plan)
        names = _at_hand(servers)
    return f"""# The broker

`make bench-broker` wrote this report. The brokers took turns in each of {plan.rounds} rounds. The
figures are medians; a ratio is one of two medians. Each broker has its own result backend and its
default arguments; ours shares the connections of its backend. {PEER.name} was measured twice:
the difference between the two is the noise. taskiq-redis is its RedisStreamBroker, in memory; a
crash of Redis loses the tasks.

{table(["", ""], environment)}

## Sending

Senders are coroutines of one process. Each sends again as soon as its previous task was accepted.
No worker runs.

{table(["senders:", "broker", "tasks/s:", "ours / it:", "p50 ms:"], _senders(senders, names))}

## From end to end

{plan.tasks:,} empty tasks from 100 senders to running worker processes, from sending the first task
to storing the last result.

{table(["processes:", "broker", "tasks/s:", "ours / it:"], _tasks(tasks, names))}

## From the commit to the start

An idle worker, one task at a time: from the return of `kiq()`, or of `session.commit()`, to the
start of the task.

{table(["broker", "p50 ms:", "p99 ms:"], _starts(starts))}

## What it costs the application

Three transactions of an application: one inserts an order, one also inserts a row as large as a
task into another table, and one inserts an order and sends a task with `in_session()`.

{_costs(transactions)}
"""


def _senders(samples: Mapping[tuple[Any, int], list[Sample]], names: list[Any]) -> Rows:
    rows: Rows = []
    for senders in SENDERS:
        ours = medians(samples[OURS, senders])
        for name in names:
            sample = medians(samples[name, senders])
            ratio = ours.per_second / sample.per_second
            figures = [number(sample.per_second), number(ratio), number(sample.p50_ms)]
            rows.append([str(senders), name.name, *figures])
    return rows


def _tasks(rates: Mapping[tuple[Any, int], list[float]], names: list[Any]) -> Rows:
    return [
        [
            str(processes),
            name.name,
            number(median(rates[name, processes])),
            number(median(rates[OURS, processes]) / median(rates[name, processes])),
        ]
        for processes in PROCESSES
        for name in names
    ]


def _starts(latencies: Mapping[str, tuple[float, float]]) -> Rows:
    return [[name, number(p50), number(p99)] for name, (p50, p99) in latencies.items()]


def _costs(rates: Mapping[tuple[str, int], list[float]]) -> str:
    rows = [
        [
            str(clients),
            kind,
            number(median(rates[kind, clients])),
            number(median(rates[kind, clients]) / median(rates[BARE, clients])),
        ]
        for clients in CLIENTS
        for kind in (PLAIN, BARE, ENQUEUED)
    ]
    headers = ["clients:", "in the transaction", "transactions/s:", "of the bare row:"]
    return table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.broker")
    parser.add_argument("--quick", action="store_true", help="a short look")
    is_quick = parser.parse_args().quick
    with postgres(settings=DURABLE) as server, redis_server() as redis_url:
        plan = QUICK if is_quick else Plan()
        markdown = asyncio.run(measure_all(server.dsn, redis_url, plan))
    print(f"\n{markdown}")
    directory = DIRECTORY.parent / "build" / "bench" if is_quick else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "BROKER.md").write_text(markdown, "utf-8")


if __name__ == "__main__":
    main()
