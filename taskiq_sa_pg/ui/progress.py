"""Progress on pages: a bar if the metadata has numbers, otherwise the state's text."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from taskiq.serializers import JSONSerializer, ORJSONSerializer

from taskiq_sa_pg.codec import SignedSerializer
from taskiq_sa_pg.exceptions import ResultDecodeError
from taskiq_sa_pg.ui.formatting import number, pretty
from taskiq_sa_pg.ui.site import Site

_TOTALS: Final = ("total", "of", "max", "maximum", "size", "all")
_SHARES: Final = ("percent", "percentage", "progress", "pct")


@dataclass(frozen=True)
class Shown:
    """Progress on a page.

    Attributes:
        state: The state that the task has set.
        fraction: From 0 to 1; None if the metadata has no suitable numbers.
        text: The numbers, such as "3 of 8"; "" if there are none.
        meta: The formatted metadata; None if there is none, or it may not be decoded.
        undecodable: Why it cannot be decoded; None if it can.
    """

    state: str
    fraction: float | None = None
    text: str = ""
    meta: str | None = None
    undecodable: str | None = None


def may_decode(site: Site) -> bool:
    """Whether values may be decoded: they are JSON, or the application allows it."""
    if site.shows_values:
        return True
    settings = site.backend.settings
    if settings.models.config.field_for_payload == "Jsonb":
        return True
    serializer = settings.codec.serializer
    inner = serializer.serializer if isinstance(serializer, SignedSerializer) else serializer
    return type(inner) in {JSONSerializer, ORJSONSerializer}


async def read_progress(site: Site, task_ids: Iterable[str]) -> dict[str, Shown]:
    """Returns the progress of tasks that have some; the calls share a statement."""
    reader, config = site.backend.runtime.reader, site.backend.models.config
    wanted = list(task_ids)
    rows = await asyncio.gather(
        *(reader.read_progress(config.to_column_task_id(task_id)) for task_id in wanted)
    )
    found = {}
    for task_id, row in zip(wanted, rows, strict=True):
        if row is None:
            continue
        # Decoded only if that is harmless: see may_decode().
        if not may_decode(site):
            found[task_id] = Shown(row.state)
            continue
        try:
            meta = reader.decode_progress(row).meta
        except ResultDecodeError as exc:
            found[task_id] = Shown(row.state, undecodable=str(exc))
        else:
            found[task_id] = shown(row.state, meta)
    return found


def shown(state: str, meta: Any) -> Shown:
    """Interprets the metadata of a progress as a percentage, or as a count and a total."""
    pretty_meta = None if meta is None else pretty(meta)
    if _is_number(meta):
        return _of_percent(state, meta, pretty_meta)
    if isinstance(meta, list | tuple) and len(meta) == 2 and all(map(_is_number, meta)):
        return _of_two(state, meta[0], meta[1], pretty_meta)
    if isinstance(meta, dict):
        numbers = {str(k).lower(): v for k, v in meta.items() if _is_number(v)}
        total = next((numbers[name] for name in _TOTALS if name in numbers), None)
        others = [v for name, v in numbers.items() if name not in (*_TOTALS, *_SHARES)]
        if total is not None and others:
            return _of_two(state, others[0], total, pretty_meta)
        share = next((numbers[name] for name in _SHARES if name in numbers), None)
        if share is not None:
            return _of_percent(state, share, pretty_meta)
        if len(others) == 2:
            return _of_two(state, min(others), max(others), pretty_meta)
    return Shown(state, meta=pretty_meta)


def _of_percent(state: str, value: float, meta: str | None) -> Shown:
    # 0.25 is a share and 25 a percentage. An int of 1 is ambiguous, and shown as 1 %.
    share = value if type(value) is float and value <= 1 else value / 100
    share = min(max(share, 0.0), 1.0)
    return Shown(state, share, f"{share:.0%}", meta)


def _of_two(state: str, done: float, total: float, meta: str | None) -> Shown:
    if total <= 0 or done < 0:
        return Shown(state, meta=meta)
    return Shown(state, min(done / total, 1.0), f"{number(done)} of {number(total)}", meta)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False
