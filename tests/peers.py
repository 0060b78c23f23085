"""Which tests compare with PyTorch: those are left out where it is not installed."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PEERS = frozenset({"torch", "diffusers", "transformers", "peft", "lycoris", "accelerate"})
ARE_HERE = all(find_spec(name) for name in PEERS)
ROOT = Path(__file__).parents[1]


def needs_peers(file: Path) -> bool:
    """Whether importing a test file, or a helper that it imports, or the conftest beside it, imports a peer."""
    waiting, seen = {file, file.parent / "conftest.py"}, set()
    while waiting:
        place = waiting.pop()
        if place in seen or not place.is_file():
            continue
        seen.add(place)
        modules = _imported(place)
        if {name.partition(".")[0] for name in modules} & PEERS:
            return True
        waiting |= {folder / f"{name.replace('.', '/')}.py" for name in modules for folder in (place.parent, ROOT)}
    return False


@cache
def _imported(file: Path) -> frozenset[str]:
    """Modules that a file imports, and the names that it takes from them, which may be modules too.

    What stands inside functions is left out: the tests that call them ask for it.
    """
    modules: set[str] = set()
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            modules |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            modules |= {statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)}
    return frozenset(modules)
