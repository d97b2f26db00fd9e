"""Formats times, durations, numbers and values; input from tasks is not trusted."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from io import StringIO
from math import isfinite
from typing import Any, Final

from markupsafe import Markup

# Maximum length of one value or traceback on a page, and of all labels or arguments together.
MAX_CHARACTERS: Final = 50_000

# Maximum length of a name, for example of a task, a worker or a label.
_MAX_NAME: Final = 300

# Characters that each name and value count in addition to their own, because of their markup.
_PER_ENTRY: Final = 100

# Characters that are invisible or change how others are shown: control characters except tabs and
# line ends, direction marks, zero-width spaces, lone surrogates.
_INVISIBLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)

_MINUTE: Final = 60
_HOUR: Final = 3_600
_DAY: Final = 86_400

# Each unit with the next smaller one.
_UNITS: Final = (
    (_DAY, "d", _HOUR, "h"),
    (_HOUR, "h", _MINUTE, "min"),
    (_MINUTE, "min", 1, "s"),
)


def visible(value: Any) -> Any:
    """Makes invisible characters of a text visible, as symbols such as ␀ or as their numbers."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _INVISIBLE.sub(_shown, value.replace("\r\n", "\n"))


def _shown(match: re.Match[str]) -> str:
    number = ord(match[0])
    if number < 0x20:
        return chr(0x2400 + number)
    return "\u2421" if number == 0x7F else f"\\u{number:04x}"


def duration(seconds: float | None) -> str:
    """A time span in suitable units: "12 ms", "3.42 s", "2 min 5 s", "1 h 20 min", "3 d"."""
    if seconds is None or not isfinite(seconds):
        return "–"
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 59.95:
        return _below_a_minute(seconds)
    whole = round(seconds)
    unit, name, smaller, smaller_name = next(each for each in _UNITS if whole >= each[0])
    rest = whole % unit // smaller
    return f"{whole // unit:,} {name}" + (f" {rest} {smaller_name}" if rest else "")


def _below_a_minute(seconds: float) -> str:
    if seconds >= 0.9995:
        return f"{seconds:.3g} s"
    if seconds >= 0.001:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds * 1e6:.0f} µs" if seconds else "0 s"


def ago(at: datetime | None, now: datetime | None = None) -> Markup | str:
    """A time as its age, in one unit; the exact time is in the element's title."""
    if at is None:
        return "–"
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    text = _roughly(abs(seconds))
    shown = "just now" if text is None else f"{text} ago" if seconds > 0 else f"in {text}"
    return _time(at, shown)


def exact(at: datetime | None) -> Markup | str:
    """A time in UTC."""
    return "–" if at is None else _time(at, at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))


def _time(at: datetime, shown: str) -> Markup:
    utc = at.astimezone(UTC)
    title = f"{utc:%Y-%m-%d %H:%M:%S}.{utc.microsecond // 1000:03} UTC"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(utc.isoformat(), title, shown)


def _roughly(seconds: float) -> str | None:
    if seconds < 1:
        return None
    if seconds < _MINUTE:
        return f"{int(seconds)} s"
    unit, name = next(each[:2] for each in _UNITS if seconds >= each[0])
    return f"{int(seconds // unit):,} {name}"


def number(value: float | None) -> str:
    """A number with separators; three significant digits if it is small."""
    if value is None:
        return "–"
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(part: float, whole: float) -> str:
    """A part in percent; "0 %" and "100 %" only if it is exactly none or all."""
    if not whole:
        return "0 %"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.3g} %"


def pretty(value: Any) -> str:
    """A value as indented JSON, with all digits of integers; a text unchanged.

    A value that JSON does not support is shown as its repr(). Large JSON is generated only up to
    the shown length.
    """
    if isinstance(value, str):
        return shortened(value)
    if not isinstance(value, dict | list | tuple | int | float | None):
        return shortened(_stand_in(value))
    try:
        return _beginning(_JSON.iterencode(value))
    except Exception:  # noqa: BLE001 - unsupported keys, cycles, anyone's __repr__
        return shortened(_stand_in(value))


def _stand_in(value: Any) -> str:
    try:
        return repr(value)
    except Exception as exc:  # noqa: BLE001 - anyone's __repr__
        return f"({type(value).__qualname__}, whose repr() raises {type(exc).__qualname__})"


_JSON: Final = json.JSONEncoder(indent=2, ensure_ascii=False, default=_stand_in)


def _beginning(parts: Iterable[str]) -> str:
    text = StringIO()
    for part in parts:
        text.write(part)
        if text.tell() > MAX_CHARACTERS:
            return f"{text.getvalue()[:MAX_CHARACTERS]}\n… and more"
    return text.getvalue()


@dataclass(frozen=True)
class Entries:
    """Names and values as text, and the number of omitted ones."""

    shown: list[tuple[str, str]]
    left_out: int


def entries(pairs: Iterable[tuple[Any, Any]]) -> Entries:
    """As many labels or arguments as a page can show; always the first one."""
    given = list(pairs)
    shown: list[tuple[str, str]] = []
    room = MAX_CHARACTERS
    for name, value in given:
        if room <= 0:
            break
        shown.append((brief(str(name)), pretty(value)))
        room -= _PER_ENTRY + sum(map(len, shown[-1]))
    return Entries(shown, len(given) - len(shown))


def brief(name: str) -> str:
    """A name, shortened if it is very long."""
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}…"


def shortened(text: str) -> str:
    """A text, or its beginning and the number of omitted characters."""
    left_out = len(text) - MAX_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:MAX_CHARACTERS]}\n… and {left_out:,} more characters"


def short_task_name(name: str | None) -> str:
    """A task's name without its module, which the page shows next to it."""
    return brief(name.rpartition(":")[2] or name) if name else "–"


def key(text: str) -> str:
    """A hash of a text, for use in the id of an element."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def plural(count: int, one: str, many: str | None = None) -> str:
    """A number and its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "ago": ago,
    "brief": brief,
    "duration": duration,
    "entries": entries,
    "exact": exact,
    "key": key,
    "number": number,
    "percent": percent,
    "plural": plural,
    "short_task_name": short_task_name,
    "shortened": shortened,
}
