"""Every code block of the documentation works, on a schema of its own; and none escapes."""

import logging
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.acceptance.documents import PAGES, ROOT, Page, blocks_of, text_of
from tests.conftest import Database


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Litestar, in an application of a page, has the root logger tell of everything."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=_name)
async def test_the_code_of_a_page_works(
    path: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKIQ_SA_PG_DSN", database.dsn)
    monkeypatch.setenv("TASKIQ_SA_PG_TEST_DSN", database.server_dsn)  # for the pytest plugin
    with Page(path, tmp_path, database.dsn) as page:
        await page.run()


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_no_fence_of_a_page_escapes_the_parser(path: Path) -> None:
    fences = re.findall(r"^[\s>*+-]*(?:`{3,}|~{3,})", text_of(path), re.MULTILINE)
    found = [block for block in blocks_of(path) if block.mark != "setup"]
    assert len(fences) == 2 * len(found)


def test_every_page_is_there() -> None:
    names = {_name(page) for page in PAGES}
    assert {"README.md", "docs/quickstart.md", "docs/how-to/testing.md"} <= names
    assert sum(len(blocks_of(page)) for page in PAGES) > 20


BROKEN = {
    "Python that raises": "```python\nraise ValueError\n```\n",
    "Python that awaits what raises": (
        "```python\nimport asyncio\nawait asyncio.wait_for(asyncio.Event().wait(), 0)\n```\n"
    ),
    "Python that makes a backend with arguments of nobody": (
        "```python\nfrom taskiq_sa_pg import SQLAlchemyResultBackend\n"
        'backend = SQLAlchemyResultBackend("postgresql://host/database", what=4)\n```\n'
    ),
    "Python that is said not to run": "<!-- not run: no time -->\n```python\npass\n```\n",
    "Python for a test that does not know the page": (
        "<!-- run by: tests/conftest.py -->\n```python\npass\n```\n"
    ),
    "a file that nothing runs": "<!-- file: alone.py -->\n```python\npass\n```\n",
    "an example that is another": (
        "<!-- example: rows.py -->\n```python\npass\n```\n```shell\ntrue rows.py\n```\n"
    ),
    "a setup that raises": "<!-- setup\nraise ValueError\n-->\n",
    "a command that fails": "```shell\nfalse | true\n```\n",
    "a command that is left out without a reason": "<!-- not run -->\n```shell\nfalse\n```\n",
    "SQL that PostgreSQL refuses": "```sql\nSELECT * FROM nowhere;\n```\n",
    "another output": "```shell\necho 41\n```\n<!-- output -->\n```text\n42\n```\n",
    "a section without its head": "```ini\nname = value\n```\n",
    "TOML that is none": "```toml\nname =\n```\n",
    "JSON that is none": "```json\n{,}\n```\n",
    "a language that nobody knows": "```ruby\nputs 1\n```\n",
    "a fence without a language": "```\npass\n```\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
async def test_a_page_fails_for(text: str, database: Database, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    with (
        Page(path, tmp_path, database.dsn) as page,
        pytest.raises(AssertionError, match=r"page\.md, line \d"),
    ):
        await page.run()


@pytest.mark.parametrize("end", ["", "raise ValueError"], ids=["works", "fails"])
async def test_no_backend_of_a_page_is_left_open(
    end: str, database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nfrom taskiq_sa_pg import SQLAlchemyResultBackend\n"
        f"backend = SQLAlchemyResultBackend({database.dsn!r}, run_migrations=True)\n"
        f"await backend.startup()\n{end}\n```\n"
    )
    with Page(path, tmp_path, database.dsn) as page:
        with pytest.raises(AssertionError) if end else nullcontext():
            await page.run()
        assert not page.namespace["backend"].is_started


async def test_blocks_run_in_their_order_in_one_namespace(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "<!-- setup\nimport asyncio\nfound = [1]\n-->\n"
        "```python\nawait asyncio.sleep(0)\nfound.append(2)\n```\n"
        '- ~~~python\n  print(f"{sum(found)} after 0.25 s")\n  ~~~\n'
        "<!-- output -->\n```text\n3 after 0.71 s\n```\n"
        "<!-- file: sub/later.py -->\n```python\nprint(4)\n```\n"
        "```shell\nexport FOUND=$(python sub/later.py)\necho $FOUND\n```\n"
        "<!-- output -->\n```text\n4\n```\n"
        "```{note}\nNothing.\n```\n"
    )
    with Page(path, tmp_path, database.dsn) as page:
        await page.run()
    assert page.namespace["found"] == [1, 2]
