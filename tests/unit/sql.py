"""SQL as text, and names for it to quote."""

from typing import Any

from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import asyncpg

DIALECT = asyncpg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare

# 47 bytes, and 16 for the longest name derived from it.
names = st.text(min_size=1, max_size=47).filter(
    lambda name: "\x00" not in name and len(name.encode()) <= 47
)


def compiled(element: Any) -> str:
    return str(element.compile(dialect=DIALECT))


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
