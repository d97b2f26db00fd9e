"""The names of the package, which are imported when they are used."""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest

import taskiq_sa_pg


def imports_for_the_type_checker() -> dict[str, str]:
    """The module of each name."""
    tree = ast.parse(Path(taskiq_sa_pg.__file__).read_text("utf-8"))
    [guarded] = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in imports for name in node.names}


def test_each_name_comes_from_where_the_type_checker_thinks() -> None:
    modules = imports_for_the_type_checker()
    assert sorted(modules) == sorted(taskiq_sa_pg.__all__)
    for name, module in modules.items():
        found = taskiq_sa_pg.__getattr__(name)
        assert found is getattr(import_module(module), name)
        assert getattr(taskiq_sa_pg, name) is found


def test_all_names_are_listed_and_imported_by_a_star() -> None:
    namespace: dict[str, object] = {}
    exec("from taskiq_sa_pg import *", namespace)  # noqa: S102 - what a star imports
    assert set(taskiq_sa_pg.__all__) <= namespace.keys()
    assert {*taskiq_sa_pg.__all__, "__version__"} <= set(dir(taskiq_sa_pg))


def test_modules_are_there_without_being_imported() -> None:
    for module in {*imports_for_the_type_checker().values(), "taskiq_sa_pg.schema"}:
        name = module.removeprefix("taskiq_sa_pg.")
        assert taskiq_sa_pg.__getattr__(name) is import_module(module)


@pytest.mark.parametrize("target", ["taskiq_sa_pg.Page", "taskiq_sa_pg.results.Page"])
def test_a_name_that_was_patched_is_itself_again(target: str) -> None:
    with mock.patch(target) as patched:
        assert taskiq_sa_pg.Page is patched
    assert taskiq_sa_pg.Page is import_module("taskiq_sa_pg.results").Page


def test_the_version_is_that_of_the_distribution() -> None:
    assert taskiq_sa_pg.__version__ == version("taskiq-sa-pg")


def test_there_are_no_other_names() -> None:
    with pytest.raises(AttributeError, match="module 'taskiq_sa_pg' has no attribute 'nonsense'"):
        taskiq_sa_pg.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        exec("from taskiq_sa_pg import nonsense")  # noqa: S102
