"""The command that finds results, and follows those that are stored."""

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

from taskiq_sa_pg.cli.output import (
    JsonOption,
    complain,
    printable,
    say,
    say_json,
    say_table,
    to_json,
)
from taskiq_sa_pg.cli.since import parse_since
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.database import DEFAULT_COMMAND_TIMEOUT
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.results import MAX_LIMIT, Page, Runtime, TaskRecord, check_query

# Seconds. A result is committed later than its finished_at says, at most by the time limit of the
# statement that has stored it; --follow looks back so far, and a little further.
_OVERLAP: Final = DEFAULT_COMMAND_TIMEOUT + 5

# Between two looks, however many results are stored.
_BETWEEN_LOOKS: Final = 0.25

# How long it may take until a closed pipe, or a result that nobody was told of, is noticed.
_LONGEST_WAIT: Final = 2.0

_HEADERS: Final = ["finished at", "outcome", "seconds", "task", "task id", "error"]
# Text that a spreadsheet would execute: with a call, or a command for another program.
_FORMULA: Final = re.compile(r"[=+\-@].*[(|!]", re.DOTALL)
_POSITION: Final = re.compile(r"-?\d{1,9}")

_Say = Callable[[Sequence[TaskRecord]], None]

_Errors = Annotated[bool, typer.Option("--errors", help="Failures only.")]
_Since = Annotated[
    str | None,
    typer.Option(help="Finished in the last 30s, 15m, 2h, 7d or 1w, or since an ISO date."),
]
_TaskName = Annotated[
    str | None,
    typer.Option(help="Only of this task; needs TaskMetadataMiddleware."),
]
_Worker = Annotated[
    str | None, typer.Option(help="Only executed by this worker; needs TaskMetadataMiddleware.")
]
_Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Only with this label; may be repeated."),
]
_Arg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[KEY=]VALUE",
        help="Only with this recorded argument: by name, by position (0=VALUE), or any argument "
        "(VALUE). With a key, it may be repeated.",
    ),
]
_After = Annotated[str | None, typer.Option(help="The next page; the page before prints it.")]
_Limit = Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="How many at most.")]
_Jsonl = Annotated[bool, typer.Option("--jsonl", help="Print a JSON object on each line.")]
_Csv = Annotated[bool, typer.Option("--csv", help="Print CSV with a header line.")]
_Follow = Annotated[
    bool,
    typer.Option("--follow", "-f", help="Keep printing new results as they are stored."),
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
    """Lists results, the latest first. With --follow, the latest is last."""
    if json + jsonl + csv > 1:
        raise ConfigurationError("--json, --jsonl and --csv: choose one")
    if follow and (json or after is not None):
        raise ConfigurationError("--follow goes with neither --json nor --after; try --jsonl")
    start = None if since is None else parse_since(since)
    found = {
        # Exact, while the window keeps the search short, whatever the clocks say.
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
        say_table(_HEADERS, [_cells(record) for record in page.records])
        if page.next is not None:
            complain(f"there are more: --after {shlex.quote(page.next)}")


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
    """Prints the latest results, and then each that is stored, until the reader goes away."""
    clock = asyncio.get_running_loop().time
    async with _stored(runtime) as has_stored:
        looked_at = clock()
        # Before the page: what is stored between the two is in the page, or else new.
        seen = {_key_of(each) for each in await _find_all(runtime, found, _OVERLAP)}
        page = await _find(runtime, found, window=window, limit=limit)
        seen |= {_key_of(each) for each in page.records}
        say(page.records[::-1])
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_WAIT):
                    await has_stored.wait()
            has_stored.clear()
            if _is_reader_gone():
                raise BrokenPipeError
            # As far back as the look before saw all that was committed, however long that is ago.
            since_then, looked_at = clock() - looked_at, clock()
            records = await _find_all(runtime, found, _OVERLAP + since_then)
            say([each for each in records[::-1] if _key_of(each) not in seen])
            seen = set(map(_key_of, records))
            await asyncio.sleep(_BETWEEN_LOOKS)


@asynccontextmanager
async def _stored(runtime: Runtime) -> AsyncIterator[asyncio.Event]:
    """An event that is set whenever results were stored, or may have been unheard."""
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
    # A task may finish again.
    return record.task_id, record.finished_at


def _is_reader_gone() -> bool:
    """Whether a pipe was closed at its other end, which else only the next line would tell."""
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
        say("  ".join(_cells(record)))


class _CsvLines:
    """Prints records as CSV, with a line of names before the first."""

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


def _cells(record: TaskRecord) -> list[str]:
    return [
        record.finished_at.isoformat(sep=" ", timespec="seconds"),
        record.outcome,
        f"{record.execution_time:.3f}",
        record.task_name or "",
        record.task_id,
        record.error_type or "",
    ]


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigurationError(f"{option} {text}: write it as KEY=VALUE")
        if key in pairs:
            raise ConfigurationError(f"{option} {text}: {key} has a value already")
        pairs[key] = value
    return pairs


def _argument(texts: Sequence[str]) -> Any:
    if len(texts) == 1 and ("=" not in texts[0] or texts[0].startswith("=")):
        return texts[0].removeprefix("=")
    pairs = _pairs("--arg", texts)
    return {int(key) if _POSITION.fullmatch(key) else key: value for key, value in pairs.items()}
