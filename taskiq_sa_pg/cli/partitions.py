"""The command that makes and drops the partitions of the results table."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from taskiq_sa_pg.cli.output import JsonOption, complain, say, say_json
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

_NO_DEFAULT = (
    "there is no default partition: a result whose id belongs to no partition is refused, and lost"
)


async def partitions(
    target: Target,
    ahead: Annotated[
        str, typer.Option(help="For how long from now on there are partitions: 12h, 7d, 4w.")
    ] = "7d",
    keep: Annotated[
        str | None,
        typer.Option(
            help="Drop partitions of which all is older: 12h, 30d. Also results that have not "
            "expired. Without it nothing is dropped."
        ),
    ] = None,
    every: Annotated[str, typer.Option(help="How long a new partition is: 1h, 1d, 1w.")] = "1d",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    move_at_most: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many results may be moved from the default partition into a new one that "
            "they belong to; others wait for it.",
        ),
    ] = 10_000,
    json: JsonOption = False,
) -> None:
    """Makes partitions of a results table that is partitioned by time, and drops old ones.

    For task ids of make_task_id(), and others of UUID version 7. Run it once a day; any number may
    run at once. It gives up, with exit status 1, where locks of others keep it waiting for 3
    seconds. Results with other ids are in the default partition, which only prune empties.
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
        # Also where none could be made.
        with report.refusing():
            for each in [] if age is None else found.outdated(age):
                if dry_run or await drop_partition(runtime.database, target.config, each):
                    report.note("dropped", each)
    if json:
        say_json({**report.done, "is_dry_run": dry_run})
    elif not (any(report.done.values()) or report.is_refused):
        say(f"nothing to do: {len(found.partitions)} partitions")
    if report.is_refused:
        raise typer.Exit(1)


@dataclass
class _Report:
    """What was done, in lines that are printed at once or in JSON at the end."""

    is_dry_run: bool
    is_json: bool
    done: dict[str, list[Any]] = field(default_factory=lambda: {"made": [], "dropped": []})
    is_refused: bool = False

    def refuse(self, reason: str) -> None:
        complain(reason)
        self.is_refused = True

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What cannot be done is told, and ends this part of the work."""
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
        rows = f", with {moved:,} that were in the default partition" if moved else ""
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
    report.note("made", partition, moved)
    if report.is_dry_run and moved > most:
        report.refuse(f"{partition.name} needs --move-at-most={moved}: everybody waits meanwhile")
