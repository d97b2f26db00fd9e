"""What the modules need, and what they say without it."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "needed", "remedy"),
    [
        ("taskiq_sa_pg.fastapi", "fastapi", "pip install 'taskiq-sa-pg[fastapi]'"),
        ("taskiq_sa_pg.starlette", "starlette.routing", "pip install starlette"),
    ],
)
def test_without_the_framework_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, needed: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, needed, None)  # type: ignore[arg-type]  # which forbids it
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(module)
    assert remedy in str(caught.value)


def test_the_package_itself_needs_no_web_framework() -> None:
    code = (
        "import sys; sys.modules.update(fastapi=None, starlette=None);"
        "import taskiq_sa_pg; print(taskiq_sa_pg.Page)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Page" in run.stdout
