"""SQL as text, and names for it to quote."""

from typing import Any

from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import asyncpg

DIALECT = asyncpg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare

names = st.text(min_size=1, max_size=63).filter(
    lambda name: not {"\x00", "."} & set(name) and len(name.encode()) <= 63
)


def compiled(element: Any) -> str:
    return str(element.compile(dialect=DIALECT))


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
