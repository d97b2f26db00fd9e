"""The command that creates and drops partitions of the results table."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from taskiq_sa_pg.cli.output import MAX_INT, JsonOption, complain, plural, say, say_json
from taskiq_sa_pg.cli.since import parse_duration
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.schema import (
    InTheWayError,
    Partition,
    Partitioned,
    count_in_the_way,
    drop_partition,
    find_partitions,
    make_partition,
)

_NO_DEFAULT = "there is no default partition: a result is lost if its id belongs to no partition"


async def partitions(
    target: Target,
    ahead: Annotated[
        str, typer.Option(help="Create partitions for this time from now on: 12h, 7d, 4w.")
    ] = "7d",
    keep: Annotated[
        str | None,
        typer.Option(
            help="Drop partitions with only older results, even if they have not expired: 12h, "
            "30d. By default nothing is dropped."
        ),
    ] = None,
    every: Annotated[str, typer.Option(help="Length of a new partition: 1h, 1d, 1w.")] = "1d",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, do nothing.")
    ] = False,
    move_at_most: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_INT,
            help="Maximum number of results to move from the default partition into a new one. "
            "Other processes wait meanwhile.",
        ),
    ] = 10_000,
    json: JsonOption = False,
) -> None:
    """Create and drop partitions by time.

    The results table has to be partitioned, and task ids have to come from make_task_id() or be
    UUIDs of version 7. Results with other ids are in the default partition, which only `prune`
    empties. Run this once a day; several processes may run it at once. It gives up, with exit
    status 1, if it waits 3 seconds for a lock.
    """
    times = parse_duration("--ahead", ahead), parse_duration("--every", every)
    age = None if keep is None else parse_duration("--keep", keep)
    report = _Report(is_dry_run=dry_run, is_json=json)
    async with target.runtime() as runtime:
        found = await find_partitions(runtime.database, target.config)
        if found.default is None:
            complain(_NO_DEFAULT)
        with report.refusing():
            for each in found.missing(*times):
                await _make(runtime.database, found, each, move_at_most, report)
        # Also if none could be created.
        with report.refusing():
            for each in [] if age is None else found.outdated(age):
                if dry_run or await drop_partition(runtime.database, target.config, each):
                    report.note("dropped", each)
    if json:
        say_json({**report.done, "is_dry_run": dry_run})
    elif not (any(report.done.values()) or report.is_refused):
        say(f"nothing to do: {plural(len(found.partitions), 'partition')}")
    if report.is_refused:
        raise typer.Exit(1)


@dataclass
class _Report:
    """What was done: lines that are printed at once, or JSON at the end."""

    is_dry_run: bool
    is_json: bool
    done: dict[str, list[Any]] = field(default_factory=lambda: {"created": [], "dropped": []})
    is_refused: bool = False

    def refuse(self, reason: str) -> None:
        complain(reason)
        self.is_refused = True

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Prints an error, which ends this part of the work."""
        try:
            yield
        except SchemaError as exc:
            self.refuse(str(exc))

    def note(self, done: str, partition: Partition, moved: int = 0) -> None:
        start, end = partition.starts_at, partition.ends_at
        self.done[done].append({"name": partition.name, "start": start, "end": end, "moved": moved})
        if self.is_json:
            return
        would_be = "would be " if self.is_dry_run else ""
        rows = f", with {plural(moved, 'result')} of the default partition" if moved else ""
        times = f"{start:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} UTC"
        say(f"{would_be}{done}: {partition.name}, {times}{rows}")


async def _make(
    database: Database, found: Partitioned, partition: Partition, most: int, report: _Report
) -> None:
    try:
        moved = await (
            count_in_the_way(database, found, partition)
            if report.is_dry_run
            else make_partition(database, found.config, partition, most)
        )
    except InTheWayError as exc:
        report.refuse(str(exc))
        return
    if moved is None:
        return
    report.note("created", partition, moved)
    if report.is_dry_run and moved > most:
        report.refuse(f"{partition.name} needs --move-at-most={moved}: other processes will wait")
