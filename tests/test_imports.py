"""The modules of the package import each other in one direction."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from itertools import accumulate
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "timm_hpm"


def imported(module: str, file: Path) -> Iterator[str]:
    """Yields the names that a module imports, at its top or late, with the packages that this runs."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield from accumulate([*base.split("."), alias.name], "{}.{}".format)


def test_no_circle_of_imports():
    modules = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
               for file in PACKAGE.rglob("*.py")}
    assert len(modules) > 40
    # A package that is being imported is no new import of its parts.
    TopologicalSorter({module: {name for name in imported(module, file)
                                if name in modules and not f"{module}.".startswith(f"{name}.")}
                       for module, file in modules.items()}).prepare()
