"""The commands of README.md, except the installation."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from examples.fastapi_app.conftest import PROJECT, is_served, place_order, stream
from tests.conftest import eventually
from tests.faults.servers import free_ports
from tests.processes import heed_interrupts, processes_of

ROOT = PROJECT.parents[1]


def commands() -> list[str]:
    readme = (PROJECT / "README.md").read_text()
    (block,) = re.findall(r"^```shell\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    installation, *others = block.splitlines()
    assert installation.startswith("pip install ")
    assert len(others) == 2
    return others


@pytest.fixture
def port() -> int:
    (port,) = free_ports(1)
    return port


@pytest.fixture
def shell(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A shell for the commands, with an empty TMPDIR in which leftover files would be found."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TASKIQ_SA_PG_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PORT": str(port),
        "TMPDIR": str(tmp_path),
    }
    tmp_path.chmod(0o777)
    with subprocess.Popen(
        ["bash", "--norc"],  # noqa: S607 - the README is read by a person with a shell
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - no threads
    ) as process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()


async def test_three_commands_run_the_shop_and_ctrl_c_ends_it_without_a_trace(
    shell: subprocess.Popen[str], port: int, tmp_path: Path
) -> None:
    assert shell.stdin is not None
    with shell.stdin:
        shell.stdin.write("\n".join([*commands(), ""]))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        await eventually(lambda: is_served(client), 60, pause=0.1)
        task = await place_order(client, 2)
        events = [event async for event in stream(client, task)]
        assert events[-1][1]["state"] == "succeeded"
        task = await place_order(client, 8)
        async for _ in stream(client, task):
            os.killpg(shell.pid, signal.SIGINT)
            break
    shell.wait(timeout=30)
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_without_a_database_it_says_what_to_set() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TASKIQ_SA_PG_")}
    run = subprocess.run(
        [sys.executable, PROJECT / "run.py"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("which database? Set TASKIQ_SA_PG_DSN")
    assert run.stderr.count("\n") == 1
