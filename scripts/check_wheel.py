"""Uses the installed wheel as a user would: imports it, migrates a database, keeps one result.

Runs in a virtual environment that holds the wheel, its dependencies and the demo's, never in the
checkout's own (`make wheel`). Start it with `python -I`, or the checkout shadows the wheel.
"""

import asyncio
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from importlib import import_module
from importlib.metadata import metadata, version
from pathlib import Path

from taskiq import TaskiqResult

import taskiq_sa_pg
from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres

ALEMBIC_INI = """\
[alembic]
script_location = taskiq_sa_pg:_migrations
"""


def check(condition: object, failure: str) -> None:
    if not condition:
        sys.exit(f"wheel: {failure}")


def check_files() -> None:
    package = Path(taskiq_sa_pg.__file__).parent
    installed = Path(sysconfig.get_path("purelib")).resolve()
    check(package.resolve().parent == installed, f"imported from {package}, not from {installed}")
    check((package / "py.typed").is_file(), "py.typed is missing")
    migrations = package / "_migrations"
    check((migrations / "env.py").is_file(), "_migrations/env.py is missing")
    check(list((migrations / "versions").glob("*.py")), "_migrations/versions holds no revision")


def check_ui() -> None:
    # Its files are there, and without the extra it says what is missing.
    folder = Path(taskiq_sa_pg.__file__).parent / "ui"
    for name in ("style.css", "ui.js", "icon.svg", "htmx.min.js", "htmx.LICENSE.txt"):
        check((folder / "static" / name).is_file(), f"ui/static/{name} is missing")
    check((folder / "templates" / "base.html").is_file(), "ui/templates/base.html is missing")
    try:
        import_module("taskiq_sa_pg.ui")
    except ImportError as exc:
        check("taskiq-sa-pg[ui]" in str(exc), f"taskiq_sa_pg.ui names no remedy: {exc}")
    else:
        check(False, "taskiq_sa_pg.ui was imported without its extra")


def check_names() -> None:
    names = list(taskiq_sa_pg.__all__)
    check(names == sorted(names), "__all__ is not sorted")
    missing = [name for name in names if not hasattr(taskiq_sa_pg, name)]
    check(not missing, f"__all__ names what is not there: {missing}")


def check_version() -> None:
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    expected = tomllib.loads(pyproject.read_text("utf-8"))["project"]["version"]
    actual = version("taskiq-sa-pg")
    check(actual == expected, f"its version is {actual}, and pyproject.toml says {expected}")


def check_links() -> None:
    # A package index shows the README alone, so its links are absolute: to the release's files.
    project = metadata("taskiq-sa-pg")
    urls = dict(url.split(", ") for url in project.get_all("Project-URL", []))
    checkout = Path(__file__).parent.parent
    readme = checkout.joinpath("README.md").read_text("utf-8")
    description = project["Description"]
    links = re.findall(r"\]\(([^)]+)\)", description)
    check(len(links) == len(re.findall(r"\]\(", readme)), "its description is not README.md")
    for link in links:
        check(link.startswith("https://"), f"a link of its description is relative: {link}")
        repository = urls["Homepage"].removeprefix("https://github.com/")
        _, ours, file = link.partition(f"/{repository}/")
        if ours:
            path = re.sub(rf"^(blob/)?v{version('taskiq-sa-pg')}/|#.*", "", file)
            check((checkout / path).is_file(), f"a link of its description leads nowhere: {link}")


def check_command() -> None:
    # Without the extra it has to say what is missing.
    program = Path(sysconfig.get_path("scripts")) / "taskiq-sa-pg"
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    check(run.returncode == 1, f"{program.name} ended with {run.returncode}: {run.stderr}")
    check("taskiq-sa-pg[cli]" in run.stderr, f"{program.name} names no remedy: {run.stderr}")


def migrate(dsn: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "alembic.ini").write_text(ALEMBIC_INI, "utf-8")
        subprocess.run(
            [sys.executable, "-I", "-m", "alembic", "upgrade", "head"],
            cwd=directory,
            env=os.environ | {"TASKIQ_SA_PG_DSN": dsn},
            check=True,
        )


async def check_result(dsn: str) -> None:
    backend: SQLAlchemyResultBackend[str] = SQLAlchemyResultBackend(dsn)
    await backend.startup()
    try:
        kept = TaskiqResult(is_err=False, return_value="kept", execution_time=0.5)
        await backend.set_result("wheel", kept)
        read = await backend.get_result("wheel")
    finally:
        await backend.shutdown()
    check(read.return_value == "kept", f"read {read.return_value!r} instead of 'kept'")


def main() -> None:
    check_files()
    check_ui()
    check_names()
    check_version()
    check_links()
    check_command()
    with postgres() as server:
        migrate(server.dsn)
        asyncio.run(check_result(server.dsn))
    print("wheel ok")


if __name__ == "__main__":
    main()
