"""README.md says what is true: its examples are the files that run, its tables the real names."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import taskiq_sa_pg
from taskiq_sa_pg import SQLAlchemyResultBackend, build_models
from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.exceptions import TaskiqSaPgError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["quickstart.py", "progress.py"])
def test_an_example_is_the_file_that_the_acceptance_tests_run(name: str) -> None:
    shown = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)\n```", README, re.DOTALL)
    assert shown is not None
    assert shown[1] + "\n" == (ROOT / "examples" / name).read_text()


def test_no_code_escapes_the_parser() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == README.count("```python")
    for block in blocks:
        ast.parse(block)


def test_every_constructor_argument_has_its_row_in_this_order() -> None:
    section = README.partition("## Customization")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\**\w+)` \|", section, re.MULTILINE)
    parameters = inspect.signature(SQLAlchemyResultBackend.__init__).parameters
    real = [str(p).partition(":")[0] for name, p in parameters.items() if name != "self"]
    assert documented == real


def test_every_simple_default_is_the_real_one() -> None:
    parameters = inspect.signature(SQLAlchemyResultBackend.__init__).parameters
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            row = re.search(rf"^\| `{name}` \|.*?\| `([^`|]+)` \|", README, re.MULTILINE)
            assert row is not None, name
            assert ast.literal_eval(row[1]) == parameter.default


def test_the_longest_table_name_is_as_long_as_it_says() -> None:
    stated = re.search(r"at most (\d+) bytes in UTF-8", README)
    assert stated is not None
    longest = int(stated[1])
    TableConfig("x" * longest)
    with pytest.raises(ValueError, match="64 bytes"):
        TableConfig("x" * (longest + 1))


def test_every_error_is_in_the_table() -> None:
    errors = [
        name
        for name in taskiq_sa_pg.__all__
        if inspect.isclass(exported := getattr(taskiq_sa_pg, name))
        and issubclass(exported, TaskiqSaPgError)
        and exported is not TaskiqSaPgError
    ]
    section = README.partition("## Errors")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(errors)


def test_every_column_is_named() -> None:
    section = README.partition("## Querying results")[2].partition("\n## ")[0]
    models = build_models()
    for table in (models.results_table, models.progress_table):
        for column in table.c:
            assert f"`{column.name}`" in section
