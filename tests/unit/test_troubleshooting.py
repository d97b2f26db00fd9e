"""The guide to troubleshooting quotes messages that the package really has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"

# A heading quotes a message in backquotes; in parentheses follows whose it is, if it is not ours.
_HEADING = re.compile(r"^### (?P<quoted>`[^\n]+?`)$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"%[sdrg]|\{[^}]*\}")


def quoted() -> list[str]:
    text = PAGE.read_text("utf-8")
    return [part for each in _HEADING.findall(text) for part in re.findall("`([^`]+)`", each)]


def _text_of(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "..."


def messages() -> Iterator[str]:
    """Every text in the code, with "..." in the place of its placeholders."""
    for path in (ROOT / "taskiq_sa_pg").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if node in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                yield "".join(map(_text_of, node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield _PLACEHOLDER.sub("...", node.value)


@pytest.fixture(scope="module")
def every_message() -> str:
    return "\n".join(messages())


@pytest.mark.parametrize("fragment", quoted())
def test_a_quoted_message_is_in_the_code(fragment: str, every_message: str) -> None:
    assert fragment in every_message, f"{PAGE.name} quotes {fragment!r}: has it been reworded?"


def test_the_guide_quotes_messages() -> None:
    assert len(quoted()) > 20
