"""The command that lists results, and follows new ones."""

import asyncio
import csv as csv_module
import io
import re
import select
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import typer

from taskiq_sa_pg.cli.output import JsonOption, note, printable, say_json, to_json
from taskiq_sa_pg.cli.since import parse_since
from taskiq_sa_pg.cli.tables import Cell, say_row, say_table
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.database import DEFAULT_COMMAND_TIMEOUT
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.results import MAX_LIMIT, Page, Runtime, TaskRecord, check_query

# Seconds. A result is committed after its finished_at, at most by the time limit of the statement
# that stores it; --follow looks back this far, and a little further.
_OVERLAP: Final = DEFAULT_COMMAND_TIMEOUT + 5

# Seconds between two queries, however many results are stored.
_BETWEEN_LOOKS: Final = 0.25

# Seconds until a closed pipe, or a result without a notification, is noticed.
_LONGEST_WAIT: Final = 2.0

_HEADERS: Final = ["finished at", "outcome", "seconds", "task", "task id", "error"]
# Text that a spreadsheet would execute: it has a call, or a command for another program.
_FORMULA: Final = re.compile(r"[=+\-@].*[(|!]", re.DOTALL)
_POSITION: Final = re.compile(r"-?\d{1,9}")

_Say = Callable[[Sequence[TaskRecord]], None]

_Errors = Annotated[bool, typer.Option("--errors", help="Only failed tasks.")]
_Since = Annotated[
    str | None,
    typer.Option(help="Only finished in the last 30s, 15m, 2h, 7d or 1w, or since an ISO date."),
]
_TaskName = Annotated[
    str | None,
    typer.Option(help="Only with this task name; needs TaskMetadataMiddleware."),
]
_Worker = Annotated[
    str | None, typer.Option(help="Only of this worker; needs TaskMetadataMiddleware.")
]
_Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Only with this label; repeatable."),
]
_Arg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[KEY=]VALUE",
        help="Only with this recorded argument, by name or position (0=VALUE); a VALUE alone "
        "matches any argument. Repeatable with a key.",
    ),
]
_After = Annotated[
    str | None, typer.Option(help="Start of the next page, as printed with the page before.")
]
_Limit = Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="Maximum number of results.")]
_Jsonl = Annotated[bool, typer.Option("--jsonl", help="Print a JSON object on each line.")]
_Csv = Annotated[bool, typer.Option("--csv", help="Print CSV with a header line.")]
_Follow = Annotated[
    bool,
    typer.Option("--follow", "-f", help="Print new results as they are stored."),
]


async def list_results(
    target: Target,
    errors: _Errors = False,
    since: _Since = None,
    task_name: _TaskName = None,
    worker: _Worker = None,
    label: _Label = None,
    arg: _Arg = None,
    after: _After = None,
    limit: _Limit = 20,
    json: JsonOption = False,
    jsonl: _Jsonl = False,
    csv: _Csv = False,
    follow: _Follow = False,
) -> None:
    """List or follow results.

    The latest result is first; with --follow it is last.
    """
    if json + jsonl + csv > 1:
        raise ConfigurationError("--json, --jsonl and --csv exclude each other: choose one")
    if follow and (json or after is not None):
        raise ConfigurationError("--follow does not work with --json or --after; try --jsonl")
    start = None if since is None else parse_since(since)
    found = {
        # Exact; the window only keeps the search short, and allows for clocks that differ.
        "where": () if start is None else target.models.Result.finished_at >= start,
        "outcome": "failed" if errors else None,
        "name": task_name,
        "worker": worker,
        "label": _pairs("--label", label) if label else None,
        "argument": _argument(arg) if arg else None,
    }
    window = None
    if start is not None:
        window = max(datetime.now(UTC) - start, timedelta()) + timedelta(hours=1)
    if follow:
        say = _say_jsonl if jsonl else _CsvLines() if csv else _say_lines
        async with target.backend(check_schema="off") as backend:
            await _follow(backend.runtime, found, window, limit, say)
        return
    async with target.runtime() as runtime:
        page = await _find(runtime, found, window=window, after=after, limit=limit)
    if json:
        say_json({"results": list(map(asdict, page.records)), "next": page.next})
    elif jsonl:
        _say_jsonl(page.records)
    elif csv:
        _CsvLines()(page.records)
    else:
        say_table(_HEADERS, [_cells(record) for record in page.records], "no results")
        if page.next is not None:
            note(f"there are more: --after {shlex.quote(page.next)}")


async def _find(
    runtime: Runtime,
    found: Mapping[str, Any],
    *,
    window: timedelta | float | None,
    after: str | None = None,
    limit: int = MAX_LIMIT,
) -> Page:
    models = runtime.settings.models
    query = check_query(models, **found, window=window, after=after, limit=limit)
    return await runtime.finding.find(query)


async def _follow(
    runtime: Runtime, found: Mapping[str, Any], window: timedelta | None, limit: int, say: _Say
) -> None:
    """Prints the latest results, then new ones, until the reader of the pipe goes away."""
    clock = asyncio.get_running_loop().time
    async with _stored(runtime) as has_stored:
        looked_at = clock()
        # Before the page: a result that is stored in between is in the page, or is new later.
        seen = {_key_of(each) for each in await _find_all(runtime, found, _OVERLAP)}
        page = await _find(runtime, found, window=window, limit=limit)
        seen |= {_key_of(each) for each in page.records}
        say(page.records[::-1])
        if not page.records:
            note("no results yet; waiting for new ones")
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_WAIT):
                    await has_stored.wait()
            has_stored.clear()
            if _is_reader_gone():
                raise BrokenPipeError
            # Back to what the query before may have missed, however long ago that was.
            since_then, looked_at = clock() - looked_at, clock()
            records = await _find_all(runtime, found, _OVERLAP + since_then)
            say([each for each in records[::-1] if _key_of(each) not in seen])
            seen = set(map(_key_of, records))
            await asyncio.sleep(_BETWEEN_LOOKS)


@asynccontextmanager
async def _stored(runtime: Runtime) -> AsyncIterator[asyncio.Event]:
    """An event that is set when results were stored, or notifications may have been missed."""
    has_stored = asyncio.Event()
    listener = runtime.listener
    assert listener is not None
    channels = [runtime.settings.models.config.results_channel]

    def hear(_channel: str, _payload: str) -> None:
        has_stored.set()

    listener.add(channels, hear, has_stored.set)
    listener.start()
    try:
        yield has_stored
    finally:
        listener.remove(channels, hear)


async def _find_all(runtime: Runtime, found: Mapping[str, Any], window: float) -> list[TaskRecord]:
    page = await _find(runtime, found, window=window)
    records = page.records
    while page.next is not None:
        page = await _find(runtime, found, window=window, after=page.next)
        records += page.records
    return records


def _key_of(record: TaskRecord) -> tuple[str, datetime]:
    # A task may finish several times.
    return record.task_id, record.finished_at


def _is_reader_gone() -> bool:
    """Whether the pipe was closed; otherwise only the next line would notice."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError):  # no poll() on Windows; no file in tests
        return False


def _say_jsonl(records: Sequence[TaskRecord]) -> None:
    for record in records:
        say_json(asdict(record))


def _say_lines(records: Sequence[TaskRecord]) -> None:
    for record in records:
        say_row(_HEADERS, _cells(record))


class _CsvLines:
    """Prints records as CSV, with a header line."""

    _has_names = False

    def __call__(self, records: Sequence[TaskRecord]) -> None:
        text = io.StringIO()
        writer = csv_module.writer(text, lineterminator="\n")
        names = [field.name for field in fields(TaskRecord)]
        if not self._has_names:
            writer.writerow(names)
            self._has_names = True
        for record in records:
            writer.writerow([_csv_cell(getattr(record, name)) for name in names])
        typer.echo(text.getvalue(), nl=False)


def _csv_cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case datetime():
            return value.isoformat()
        case dict():
            return to_json(value)
        case str() if _FORMULA.match(value):
            return f"'{printable(value)}"
        case _:
            return printable(str(value))


def _cells(record: TaskRecord) -> list[Cell]:
    seconds = f"{record.execution_time:.3f}"
    names = record.task_name, record.task_id, record.error_type
    return [record.finished_at, record.outcome, seconds, *names]


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigurationError(f"{option} {text}: use KEY=VALUE")
        if key in pairs:
            raise ConfigurationError(f"{option} {text}: {key} was given already")
        pairs[key] = value
    return pairs


def _argument(texts: Sequence[str]) -> Any:
    if len(texts) == 1 and ("=" not in texts[0] or texts[0].startswith("=")):
        return texts[0].removeprefix("=")
    pairs = _pairs("--arg", texts)
    return {int(key) if _POSITION.fullmatch(key) else key: value for key, value in pairs.items()}
