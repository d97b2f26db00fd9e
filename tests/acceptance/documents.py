"""The code of the documentation's pages: found by Sybil, carried out in its order.

A fence is carried out as its language says. A comment in the line before it says otherwise:

    <!-- example: NAME -->   the file examples/NAME to the letter; as `file`
    <!-- file: NAME -->      written to the page's directory, for a shell block to run
    <!-- output -->          what the block before has printed; the digits of fractions may differ
    <!-- run by: PATH -->    a test of ours runs it, and names the page
    <!-- not run: REASON --> for shell and SQL only

A comment `<!-- setup ... -->` holds Python that readers do not see. The address that the pages
show stands for a schema of the test's own. What a page includes of another is run there alone.
"""

import ast
import configparser
import inspect
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import asyncpg
from sybil import Document, Region
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.schema.migrate import script_location
from tests.acceptance.shell import Shell

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted(
    {ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/README.md")}
)

# What the pages show: an address, the role of an application, where an install has the migrations.
_SHOWN_DSN: Final = "postgresql://user:password@localhost:5432/database"
_SHOWN_ROLE: Final = "worker"
_SHOWN_MIGRATIONS: Final = "taskiq_sa_pg:_migrations"

_FENCES: Final = FencedCodeBlockLexer("[^\n]*")
_SETUPS: Final = DirectiveInHTMLCommentLexer("setup")
_INCLUDE: Final = re.compile(
    r"^```\{include\} (\S+)\n:start-after: (.+)\n:end-before: (.+)\n(?::.+\n)*```\n", re.MULTILINE
)
_MARK: Final = re.compile(r"<!-- (example|file|output|run by|not run)(?:: (.+?))? -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fence, or Python that is there for the others.

    Attributes:
        language: What follows the fence; "python" for a setup.
        mark: The word in the comment before it; "setup" for a setup, "" for none.
        argument: What the comment says after the colon.
    """

    place: str
    language: str
    source: str
    mark: str = ""
    argument: str = ""


def text_of(page: Path) -> str:
    """A page with the parts of others that it includes, and without its own that others include."""

    def included(match: re.Match[str]) -> str:
        name, start, end = match.groups()
        return (page.parent / name).read_text("utf-8").partition(start)[2].partition(end)[0]

    text = page.read_text("utf-8")
    for other in PAGES:
        for name, start, end in _INCLUDE.findall(other.read_text("utf-8")):
            if (other.parent / name).resolve() == page:
                before, _, rest = text.partition(start)
                part, _, after = rest.partition(end)
                text = before + "\n" * part.count("\n") + after
    return _INCLUDE.sub(included, text)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    document = Document(text_of(page), str(page))
    found = [(region, "") for region in _FENCES(document)]
    found += [(region, "setup") for region in _SETUPS(document)]
    return [
        _block(document, region, mark)
        for region, mark in sorted(found, key=lambda each: each[0].start)
    ]


def _block(document: Document, region: Region, mark: str) -> Block:
    lexemes = region.lexemes
    place = f"{document.path}, line {document.text.count(chr(10), 0, region.start) + 1}"
    if mark:
        return Block(place, "python", lexemes["source"], mark)
    marked = _MARK.search(document.text[: region.start])
    word, argument = marked.groups("") if marked else ("", "")
    return Block(place, lexemes["language"].strip(), lexemes["source"], word, argument)


class Page:
    """Carries out the blocks of a page, in one namespace and one directory.

    Use it as a context manager: at the end the worker that it started is stopped.
    """

    def __init__(self, path: Path, directory: Path, dsn: str) -> None:
        self.blocks: Final = blocks_of(path)
        self._module = ModuleType(f"page {path.stem}")
        self._module.__file__ = str(directory / "page.py")  # by which a setup finds the files
        self.namespace: Final[dict[str, Any]] = vars(self._module)
        self._path = path
        self._directory = directory
        self._dsn = dsn
        self._printed = ""
        self._shell = Shell(directory)
        self._run: Mapping[str, Callable[[str], Awaitable[str]]] = {
            "python": self._run_python,
            "shell": self._run_shell,
            "sql": self._run_sql,
        }

    def __enter__(self) -> "Page":
        sys.modules[self._module.__name__] = self._module  # where taskiq looks for its tasks
        return self

    def __exit__(self, *exc: object) -> None:
        del sys.modules[self._module.__name__]
        self._shell.close()

    async def run(self) -> None:
        """Raises AssertionError where a block fails, or nobody would run it."""
        try:
            for block in self.blocks:
                try:
                    await self._carry_out(block)
                except Exception as exc:
                    raise AssertionError(f"{block.place}: {exc!r}") from exc
        finally:
            # Before taskiq 0.13, InMemoryBroker's shutdown() leaves it to us.
            for backend in self._backends():
                await backend.shutdown()

    async def _carry_out(self, block: Block) -> None:
        if block.mark in {"example", "file"}:
            self._write(block)
        elif block.mark == "output":
            assert comparable(block.source) == comparable(self._printed)
        elif block.mark == "run by":
            assert self._path.name in (ROOT / block.argument).read_text("utf-8"), (
                f"{block.argument} does not name this page"
            )
        elif block.mark == "not run":
            assert block.language in {"shell", "sql"}, "only shell and SQL may be left out"
            assert block.argument, "say why"
        elif block.language in self._run:
            dsn = shlex.quote(self._dsn) if block.language == "shell" else self._dsn
            source = block.source.replace(_SHOWN_DSN, dsn)
            self._printed = await self._run[block.language](source)
        else:
            _check(block)

    def _write(self, block: Block) -> None:
        if block.mark == "example":
            assert block.source == (ROOT / "examples" / block.argument).read_text("utf-8")
        name = Path(block.argument).stem
        others = "".join(each.source for each in self.blocks if each is not block)
        assert block.language != "python" or name == "conftest" or name in others, (
            "no shell block runs this file, and no other file imports it"
        )
        path = self._directory / block.argument
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.source, "utf-8")

    async def _run_python(self, source: str) -> str:
        code = compile(source, self._path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        with redirect_stdout(io.StringIO()) as printed:
            awaitable = eval(code, self.namespace)  # noqa: S307 - our own documentation
            if inspect.isawaitable(awaitable):
                await awaitable
        for backend in self._backends():
            # Of one that a page only shows, its arguments have to be the engine's at least.
            if not backend.is_started:
                settings = backend.settings
                backend.settings = replace(settings, check_schema="off", run_migrations=False)
                await backend.startup()
                await backend.shutdown()
                backend.settings = settings
        return printed.getvalue()

    def _backends(self) -> list[SQLAlchemyResultBackend[Any]]:
        made = self.namespace.values()
        return [each for each in made if isinstance(each, SQLAlchemyResultBackend)]

    async def _run_shell(self, source: str) -> str:
        return await self._shell.run(source.replace(_SHOWN_MIGRATIONS, script_location()))

    async def _run_sql(self, source: str) -> str:
        connection = await asyncpg.connect(self._dsn)
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(re.sub(rf"\b{_SHOWN_ROLE}\b", "CURRENT_USER", source))
        finally:
            await transaction.rollback()
            await connection.close()
        return ""


def comparable(printed: str) -> str:
    """What is the same whenever it is printed."""
    return re.sub(r"\d+\.\d+", "0.0", printed.strip())


def _check(block: Block) -> None:
    if block.language.startswith("{"):
        return  # a directive, which Sphinx carries out
    checks: Mapping[str, Callable[[str], object]] = {
        "html": str,  # for browsers: the example application has it in its page, and a test
        "ini": configparser.ConfigParser(interpolation=None).read_string,
        "json": json.loads,
        "text": str,
        "toml": tomllib.loads,
    }
    assert block.language in checks, f"nobody knows what to do with {block.language!r}"
    checks[block.language](block.source)
