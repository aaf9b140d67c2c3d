"""The modules of the package import each other in one direction."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "timm_hpm"


def imported(module: str, file: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yields the modules that a module imports, at its top or late, with the packages that this runs."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = [*(package[:len(package) - node.level + 1] if node.level else []),
                *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            parts = [*base, alias.name] if ".".join([*base, alias.name]) in modules else base
            yield from (name for end in range(1, len(parts) + 1) if (name := ".".join(parts[:end])) in modules)


def test_no_circle_of_imports():
    modules = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    assert len(modules) > 40
    # A package that is being imported is no new import of its parts.
    graph = {module: {name for name in imported(module, file, modules) if not f"{module}.".startswith(f"{name}.")}
             for module, file in modules.items()}
    TopologicalSorter(graph).prepare()
