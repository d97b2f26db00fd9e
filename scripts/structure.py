"""Measures how the package is built, from its source alone; `--check` fails if a bound is broken.

A room is a sub-package or a single module; a sub-package's `__init__.py` is its face. A name that
is imported from a face counts as imported from the module that defines it: faces hide nothing.

`--way` imports the package instead, and counts the modules that run during set_result().
"""

import argparse
import ast
import asyncio
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

PACKAGE: Final = "taskiq_sa_pg"
FOLDERS: Final = (PACKAGE, "tests", "benchmarks", "examples", "scripts")
# Imported where it is needed, not through the face, because Alembic is slow to import.
PAST_FACES: Final = {f"{PACKAGE}.schema.migrate"}
# Documented by namedtuple and SQLAlchemy's Row; the underscore only keeps them clear of fields.
DOCUMENTED: Final = {"_make", "_asdict", "_replace", "_fields", "_mapping", "_field_defaults"}
NAME_TAKERS: Final = {"setattr", "getattr", "hasattr", "delattr", "patch", "object"}
PRIVATE: Final = re.compile(r"_(?!_)\w*[^\W_]\w*")
# The brace, because nobody can see that what an f-string fills in is public.
PRIVATE_TARGET: Final = re.compile(rf"{PACKAGE}\.(\w+\.)*(_(?!_)|\{{)")

AnyImport = ast.Import | ast.ImportFrom
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Figure(NamedTuple):
    name: str
    value: float
    bound: float | None = None
    remark: str = ""
    places: Iterable[str] = ()

    def __str__(self) -> str:
        bound = "" if self.bound is None else f"bound {self.bound:,}"
        return f"{self.name:<30}{self.value:>7,}  {bound:<11}  {self.remark}".rstrip()


class Import(NamedTuple):
    importer: str
    line: int
    target: str
    alias: str
    kind: str  # "function": inside one; "types": for the type checker only; else empty


class Package:
    def __init__(self, trees: Mapping[Path, ast.Module]) -> None:
        names = {path: ".".join(path.with_suffix("").parts) for path in trees}
        self.paths = {names[p].removesuffix(".__init__"): p for p in trees if p.parts[0] == PACKAGE}
        self.trees = {module: trees[path] for module, path in self.paths.items()}
        self.faces = {m for m, path in self.paths.items() if path.stem == "__init__"}
        self.modules = self.paths.keys() - self.faces
        self.imports = [each for item in self.trees.items() for each in self.imports_of(*item)]
        exports = {f"{i.importer}.{i.alias}": i for i in self.imports if i.importer in self.faces}
        self.exports = {name: i.target for name, i in exports.items() if name != i.target}

    def arrows_seen(self) -> set[tuple[str, str]]:
        """From each module to the files that it names: to a face, not to what is behind it."""
        files = [(i.importer, i.target.removesuffix(".*")) for i in self.imports]
        named = [(m, t if t in self.paths else owner_of(t)) for m, t in files]
        return {(m, t) for m, t in named if m in self.modules and t in self.paths and t != m}

    def imports_of(self, importer: str, tree: ast.Module) -> Iterator[Import]:
        chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        package = importer if importer in self.faces else owner_of(importer)
        for node, kind in find_imports(tree):
            prefix, suffix = "", ".*"
            if isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package)
                prefix, suffix = f"{source}.", ""
            for name in node.names:
                target, alias = prefix + name.name + suffix, name.asname or name.name
                face = target.removesuffix(".*")
                # Of a face that is imported as a whole, what is used of it counts.
                used = [c for c in chains if owner_of(c) == alias and face in self.faces]
                for each in [face + c.removeprefix(alias) for c in used] or [target]:
                    if each.split(".")[0] == PACKAGE:
                        yield Import(importer, node.lineno, each, alias, kind)

    def definers(self, target: str) -> set[str]:
        """The module that defines what is imported; of a face, those of all that it exports."""
        if target in self.exports:
            return self.definers(self.exports[target])
        if (face := target.removesuffix(".*")) in self.faces:
            return set().union(*(self.definers(n) for n in self.exports if owner_of(n) == face))
        return {target, owner_of(target)} & self.modules

    def arrows(self, kinds: set[str], name_of: Callable[[str], str]) -> dict[str, set[str]]:
        arrows: dict[str, set[str]] = {name_of(module): set() for module in self.modules}
        for each in self.imports:
            if each.kind in kinds and name_of(each.importer) in arrows:
                targets = {owner_of(each.target), *self.definers(each.target)}
                arrows[name_of(each.importer)].update(map(name_of, targets))
        return {name: (targets & arrows.keys()) - {name} for name, targets in arrows.items()}

    def is_past_face(self, each: Import) -> bool:
        reached = ".".join(each.target.split(".")[:3])
        is_hidden = reached in self.trees.keys() - PAST_FACES and each.target not in self.exports
        return is_hidden and reached.count(".") == 2 and room_of(reached) != room_of(each.importer)


def measure(root: Path) -> Iterator[Figure]:
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    texts = {path.relative_to(root): path.read_text("utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    package = Package(trees)
    lines = {str(path): texts[path].count("\n") for path in package.paths.values()}
    lengths = {
        f"{package.paths[module]}:{node.lineno} {node.name}()": length_of(node)
        for module, tree in package.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Function)
    }
    yield Figure("files", len(lines))
    yield Figure("lines", sum(lines.values()), 25_300)
    for what, sizes, bound in (("file", lines, 450), ("function", lengths, 60)):
        longest = max(sizes, key=sizes.__getitem__)
        yield Figure(f"lines of the longest {what}", sizes[longest], bound, longest)

    yield floors("rooms", package.arrows({"", "function"}, room_of), 10)
    yield floors("modules", package.arrows({"", "function"}, str), 23)
    modules = len(package.modules)
    yield Figure("arrows a module", round(len(package.arrows_seen()) / modules, 2), 4.2)
    arrows = package.arrows({"", "function", "types"}, str)
    yield Figure("the same through faces", round(sum(map(len, arrows.values())) / modules, 2))
    imports = package.imports
    for name, limit, chosen in (
        ("imports inside functions", None, [i for i in imports if i.kind == "function"]),
        ("imports for types only", None, [i for i in imports if i.kind == "types"]),
        ("imports of no module", None, [i for i in imports if not package.definers(i.target)]),
        ("imports past a face", 0, [i for i in imports if package.is_past_face(i)]),
    ):
        places = sorted({f"{package.paths[i.importer]}:{i.line} {i.target}" for i in chosen})
        yield Figure(name, len(places), limit, places=places)
    known = set().union(*map(private_names, package.trees.values()))
    touched = [f"{path}:{place}" for path, tree in trees.items() for place in touches(tree, known)]
    yield Figure("private names of others", len(touched), 0, places=touched)


def floors(what: str, arrows: Mapping[str, set[str]], bound: int) -> Figure:
    below: dict[str, list[str]] = {}
    try:
        for node in TopologicalSorter(arrows).static_order():
            below[node] = [node, *max((below[n] for n in arrows[node]), key=len, default=[])]
    except CycleError as exc:
        return Figure(f"cycles of {what}", 1, 0, " > ".join(exc.args[1][::-1]))
    path = max(below.values(), key=len)
    return Figure(f"floors of {what}", len(path), bound, f"{len(arrows)} {what}, no cycle", path)


def owner_of(name: str) -> str:
    return name.rpartition(".")[0]


def room_of(module: str) -> str:
    return "".join(module.split(".")[1:2])


def length_of(function: Function) -> int:
    counted = [function, *function.body[: ast.get_docstring(function) is not None]]
    whole, *docstring = [(node.end_lineno or 0) - node.lineno + 1 for node in counted]
    return whole - sum(docstring)


def find_imports(node: ast.AST, kind: str = "") -> Iterator[tuple[AnyImport, str]]:
    if isinstance(node, AnyImport):
        yield node, kind
    kind = kind or ("function" if isinstance(node, Function) else "")
    is_guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        is_guarded = is_guard and child not in getattr(node, "orelse", ())
        yield from find_imports(child, "types" if is_guarded else kind)


def private_names(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    names = [node.name for node in nodes if isinstance(node, Function | ast.ClassDef)]
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    names += [re.sub(r"^(self|cls)\.", "", ast.unparse(node)) for node in stored]
    return {name for name in names if PRIVATE.fullmatch(name)} - DOCUMENTED


def touches(tree: ast.Module, known: set[str]) -> Iterator[str]:
    others = known - private_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(owner, name) if name in others:
                if ast.unparse(owner) not in {"self", "cls", "super()"}:
                    yield f"{node.lineno} {ast.unparse(node)}"
            case ast.ImportFrom(module=str(source)) if source.split(".")[0] == PACKAGE:
                private = [n.name for n in node.names if PRIVATE.fullmatch(n.name)]
                yield from (f"{node.lineno} {source}.{name}" for name in private)
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name)) if name in NAME_TAKERS:
                for text in [ast.unparse(a).removeprefix("f").strip("'\"") for a in node.args[:2]]:
                    if text in others or PRIVATE_TARGET.match(text):
                        yield f"{node.lineno} {text}"


async def follow() -> list[Figure]:
    # Here, because measuring the source needs nothing installed.
    from taskiq import TaskiqResult  # noqa: PLC0415

    from taskiq_sa_pg import SQLAlchemyResultBackend  # noqa: PLC0415
    from taskiq_sa_pg.embedded import postgres  # noqa: PLC0415

    figures = []
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.split(".")[0] == PACKAGE:
            calls[module] += 1

    result = TaskiqResult(is_err=False, return_value=1, execution_time=0.1)
    with postgres() as server:
        backend = SQLAlchemyResultBackend[int](server.dsn, run_migrations=True)
        await backend.startup()
        for callers in (1, 50):
            calls.clear()
            writes = [backend.set_result(f"{callers}.{i}", result) for i in range(callers)]
            sys.setprofile(note)
            await asyncio.gather(*writes)
            sys.setprofile(None)
            places = [f"{count:>7,} {module}" for module, count in calls.items()]
            figures.append(Figure(f"modules, {callers} at a time", len(calls), 20, places=places))
        await backend.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how the package is built.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--check", action="store_true", help="fail if a bound is broken")
    parser.add_argument("--verbose", action="store_true", help="show each place")
    parser.add_argument("--way", action="store_true", help="follow set_result() instead")
    options = parser.parse_args()
    figures = asyncio.run(follow()) if options.way else list(measure(options.root))
    for figure in figures:
        print(figure, *(figure.places if options.verbose or options.way else ()), sep="\n    ")
    broken = [f"broken: {f}" for f in figures if f.bound is not None and f.value > f.bound]
    if options.check and broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
