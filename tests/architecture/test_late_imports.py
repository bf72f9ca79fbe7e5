"""Who may import the packages of an extra at the top of a file."""

from __future__ import annotations

import ast

from test_architecture import EXTRAS, TREES, imports


def test_the_server_is_imported_late() -> None:
    """Its modules may import their packages at the top, as they are read when somebody serves, and by nobody else."""
    without = {"server/dialects.py", "server/conversation.py", "server/constraints.py", "server/__init__.py"}
    free = {f"finemoe.{name.removesuffix('.py').replace('/', '.')}" for name in without} | {"finemoe.server"}
    others = [
        f"{name} imports {module}"
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom) and not name.startswith("server/")
        for module, _ in imports(node)
        if module.startswith("finemoe.server") and module not in free
    ]
    assert not others
    for name in without:
        assert not {module.split(".")[0] for module, _ in imports(TREES[name])} & EXTRAS
