"""The documentation site: `make docs`. It needs no network, and every warning is an error."""

import warnings
from importlib.metadata import version as version_of

from sphinx.application import Sphinx
from sqlalchemy.exc import SAWarning

project = "taskiq_sa_pg"
author = copyright = "the taskiq_sa_pg authors"
version = release = version_of("taskiq-sa-pg")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
smartquotes = False  # what is quoted is mostly code

# The docstrings are Google's style, with single backticks for code.
default_role = "code"
napoleon_numpy_docstring = False
toc_object_entries_show_parents = "hide"  # the menu says `get_result()` under its class
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

nitpicky = True
# What others document: there is no inventory of theirs without a network. And our type variables.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(asyncio|collections|datetime|fastapi|pathlib|sqlalchemy|starlette|taskiq|typing|uuid)(\..+)?",
    ),
    (r"py:class", r"ColumnElement|LambdaElement|SQLCoreOperations"),  # as SQLAlchemy abbreviates
    (r"py:exc", r"TaskiqResultTimeoutError|SendTaskError|UnknownTaskError"),
    (r"py:class", r".*\b_(T|P|R|Id|ReturnType)"),
    (r"py:class", r"taskiq_sa_pg\.results\.settings\.Settings"),  # the package's own
]

# autodoc looks at every attribute of the mixins, which are for mapped classes.
warnings.filterwarnings("ignore", "Unmanaged access of declarative attribute", SAWarning)


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _mark_code, priority=400)  # napoleon's is 500


def _mark_code(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Makes a literal block of what a docstring indents after an empty line."""
    for number in range(len(lines) - 2, 0, -1):
        before, empty, line = lines[number - 1 : number + 2]
        if line.startswith("    ") and not empty and before[:1].strip():
            lines[number:number] = ["", "::"]
