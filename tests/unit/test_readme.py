"""The documentation says what is true: its tables have the real names, its links lead somewhere."""

import ast
import inspect
import re
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest

import taskiq_sa_pg
from taskiq_sa_pg import SQLAlchemyResultBackend, TableConfig, build_models, exceptions
from taskiq_sa_pg.exceptions import TaskiqSaPgError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REFERENCE = ROOT / "docs" / "reference"
BACKEND = (REFERENCE / "backend.md").read_text()


def test_every_constructor_argument_has_its_row_in_this_order() -> None:
    section = BACKEND.partition("## Constructor")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\**\w+)` \|", section, re.MULTILINE)
    parameters = inspect.signature(SQLAlchemyResultBackend.__init__).parameters
    real = [str(p).partition(":")[0] for name, p in parameters.items() if name != "self"]
    assert documented == real


def test_every_simple_default_is_the_real_one() -> None:
    parameters = inspect.signature(SQLAlchemyResultBackend.__init__).parameters
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            row = re.search(rf"^\| `{name}` \|.*?\| `([^`|]+)` \|", BACKEND, re.MULTILINE)
            assert row is not None, name
            assert ast.literal_eval(row[1]) == parameter.default


def test_the_longest_table_name_is_as_long_as_it_says() -> None:
    stated = re.search(r"at most (\d+) bytes in UTF-8", BACKEND)
    assert stated is not None
    longest = int(stated[1])
    TableConfig("x" * longest)
    with pytest.raises(ValueError, match="64 bytes"):
        TableConfig("x" * (longest + 1))


def test_the_longest_task_id_is_as_long_as_it_says() -> None:
    page = (REFERENCE / "errors.md").read_text()
    stated = re.search(r"`str` of at most ([\d,]+) bytes in UTF-8", page)
    assert stated is not None
    longest, config = int(stated[1].replace(",", "")), TableConfig()
    config.to_column_task_id("x" * longest)
    with pytest.raises(exceptions.InvalidTaskIdError, match="longer than"):
        config.to_column_task_id("x" * (longest + 1))


def test_every_error_is_in_the_table_and_described() -> None:
    errors = [
        name
        for name, error in inspect.getmembers(exceptions, inspect.isclass)
        if issubclass(error, TaskiqSaPgError) and error is not TaskiqSaPgError
    ]
    page = (REFERENCE / "errors.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == errors
    described = re.findall(r"^\.\. autoexception:: (\w+)$", page, re.MULTILINE)
    assert sorted(described) == sorted([*errors, "TaskiqSaPgError"])
    assert set(errors) <= set(taskiq_sa_pg.__all__)


def test_every_column_has_its_row_in_this_order() -> None:
    page = (REFERENCE / "models.md").read_text()
    # In the order of the classes: Result, Progress, Status, Worker, Queue, Schedule.
    tables = build_models(queue=True).metadata.tables.values()
    columns = chain(*[table.c for table in tables])
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [c.name for c in columns]


def test_every_environment_variable_is_named_and_read() -> None:
    code = "".join(path.read_text() for path in ROOT.glob("[a-z]*/**/*.py"))
    package = "".join(path.read_text() for path in ROOT.glob("taskiq_sa_pg/**/*.py"))
    options = {f"TASKIQ_SA_PG_{field.name.upper()}" for field in fields(TableConfig)}
    page = (REFERENCE / "environment.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert options | _variables(package) <= named
    assert named <= options | _variables(code)


def _variables(code: str) -> set[str]:
    return set(re.findall(r"\bTASKIQ_SA_PG_[A-Z_]*[A-Z]\b", code)) - {"TASKIQ_SA_PG_NAME"}


def test_there_is_a_place_for_the_versions_that_were_seen_to_pass() -> None:
    marked = re.findall(
        r"^<!-- matrix -->\n.+\n<!-- /matrix -->$",
        (REFERENCE / "compatibility.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert len(marked) == 1


def test_every_link_of_the_readme_leads_to_a_file_or_a_heading() -> None:
    headings = {
        heading.lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (ROOT / target.partition("#")[0]).is_file(), target


def test_the_readme_is_for_the_first_five_minutes() -> None:
    lines = README.splitlines()
    assert lines.index("```python") < 25
    assert len([line for line in lines if line.startswith("| ") and "---" not in line]) - 2 <= 10
    assert len(re.findall(r"!\[", README)) == 1
    prose = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", " ", README, flags=re.DOTALL)
    assert len(re.findall(r"\w[\w'-]*", prose)) <= 900
