"""What imports what: wings only wings below them, and heavy libraries only when they are needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lowmem_adamms import settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lowmem_adamms"

# Lowest first: a wing imports only wings that stand before it. Any wing may import the kernels.
WINGS = (
    "version", "errors", "values", "methods", "settings", "answers", "prompts", "hub",
    "checkpoints", "architectures", "mapping", "merging", "live", "quantizing", "serving",
    "searching", "demo", "reporting", "comparing", "api", "cli",
)  # fmt: skip
HEAVY = {"bitsandbytes", "datasets", "jinja2", "numba", "pydantic", "torch", "transformers"}


@dataclass(frozen=True)
class Import:
    """One name that a file imports; modules are relative to the package, its root is ""."""

    importer: str
    imported: str
    line: int
    when_loaded: bool

    @property
    def wings(self) -> tuple[str, str]:
        """The wings of importer and imported."""
        return self.importer.partition(".")[0], self.imported.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported or 'lowmem_adamms'}"


def module_name(file: Path) -> str:
    """`mapping.plan` for lowmem_adamms/mapping/plan.py, `mapping` for its __init__.py."""
    folder = PACKAGE if file.is_relative_to(PACKAGE) else ROOT
    parts = file.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for folder in (PACKAGE, ROOT / "kernels")
         for file in sorted(folder.rglob("*.py"))}  # fmt: skip


def import_statements(
    tree: ast.AST, when_loaded: bool = True
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import statement, and whether it runs when the file itself is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, when_loaded
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from import_statements(node, when_loaded and not in_function and not for_types)


def imported_names(file: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Absolute dotted names, those of this package after `lowmem_adamms.`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    source = [node.module] if node.module else []
    if node.level:
        wing = module_name(file.parent / "__init__.py")
        folder = ["lowmem_adamms", *wing.split(".")] if wing else ["lowmem_adamms"]
        source = folder[: len(folder) - node.level + 1] + source
    yield from (".".join([*source, alias.name]) for alias in node.names)


def own_module(name: str) -> str:
    """The file of this package that an absolute name is, or is defined in."""
    inner = name.removeprefix("lowmem_adamms").removeprefix(".")
    return inner if inner in FILES else inner.rpartition(".")[0]


def all_imports() -> Iterator[Import]:
    """Every name that any file imports: ours by module, a library's by its first part."""
    for importer, file in FILES.items():
        for node, when_loaded in import_statements(ast.parse(file.read_text())):
            for name in imported_names(file, node):
                ours = name.partition(".")[0] == "lowmem_adamms"
                imported = own_module(name) if ours else f"library.{name.partition('.')[0]}"
                yield Import(importer, imported, node.lineno, when_loaded)


IMPORTS = list(all_imports())
INTERNAL = [found for found in IMPORTS if not found.imported.startswith("library.")]


def test_every_file_belongs_to_a_wing() -> None:
    wings = {name.partition(".")[0] for name in FILES} - {"", "__main__", "kernels"}
    assert wings == set(WINGS)


def goes_up(found: Import) -> bool:
    """Whether an import leaves its wing in any direction but downward."""
    importer, imported = found.wings
    if importer == imported or imported == "kernels":
        return False
    if importer in ("", "__main__"):
        return imported not in WINGS
    if importer not in WINGS or imported not in WINGS:
        return True
    return WINGS.index(imported) > WINGS.index(importer)


def test_wings_import_only_wings_below_them() -> None:
    assert [str(found) for found in INTERNAL if goes_up(found)] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in FILES}
    for found in INTERNAL:
        graph[found.importer].add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def loaded_with(entry: str) -> set[str]:
    """All files that are imported when this one is, itself included."""
    loaded, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        if name in loaded or name not in FILES:
            continue
        loaded.add(name)
        waiting.append(name.rpartition(".")[0])
        waiting += [i.imported for i in INTERNAL if i.importer == name and i.when_loaded]
    return loaded


@pytest.mark.parametrize("entry", ["cli", "api", "live.placement"])
def test_importing_the_package_imports_no_heavy_library(entry: str) -> None:
    loaded = loaded_with(entry)
    assert [
        str(found)
        for found in IMPORTS
        if found.when_loaded
        and found.importer in loaded
        and found.imported.removeprefix("library.") in HEAVY
    ] == []


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in PACKAGE.glob("*/__init__.py")), ids=lambda p: p.name
)
def test_the_docstring_of_a_wing_lists_its_files(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    words = {word.removesuffix(".py") for word in re.findall(r"[\w.]+", text)}
    files = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert files <= words


def test_no_message_below_the_command_line_speaks_of_its_options() -> None:
    """It names the setting, as Python users write it; `cli/` turns that into the option."""
    own = {f"--{'no-' if item.metadata['option'].off else ''}{item.name.replace('_', '-')}"
           for kind in vars(settings).values() if is_dataclass(kind)
           for item in fields(kind) if "option" in item.metadata}  # fmt: skip
    assert "--batch-size" in own and "--no-drafts" in own
    found = []
    for module, file in FILES.items():
        if module.partition(".")[0] in ("cli", "settings"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        not_shown = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant):
                continue
            text = node.value
            if not isinstance(text, str) or id(node) in not_shown or text.startswith("-"):
                continue  # a docstring, or a word of a command that is shown as a whole
            words = re.findall(r"(?<!\w)-o\b|--[a-z][a-z-]+", text)
            found += [f"{module}, line {node.lineno}: {word}" for word in words
                      if word in own or word == "-o"]  # fmt: skip
    assert not found
