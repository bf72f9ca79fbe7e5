"""The rules of the house that a reader of one file cannot see, checked on the syntax tree of the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from finemoe.core.config import read_toml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "finemoe"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))

# A module imports its own package and strictly lower floors.
FLOORS = {
    "core": 0,
    "model": 1,
    "text": 1,
    "sandbox": 1,
    "charts": 1,
    "data": 2,
    "checkpoint": 2,
    "judging": 2,
    "parallel": 2,
    "training": 3,
    "generation": 3,
    "methods": 4,
    "compression": 4,
    "evaluation": 4,
    "analysis": 4,
    "runs": 5,
    "server": 5,
    "studies": 6,
    "cli": 7,
}
# Within a package the same: what stands to the right imports what stands to the left, and never a neighbour.
INNER_FLOORS = {
    "checkpoint": (
        {"storage"},
        {"kinds.py", "own_config.py"},
        {"run_state"},
        {"weights"},
        {"huggingface", "gguf"},
        {"open.py", "through_import.py", "portability.py"},
        {"language_model.py", "selection.py", "fingerprint.py", "doctor", "proof"},
        {"adapters", "sizes.py"},
        {"conversion.py"},
    ),
}
FRONT = {"__init__.py", "__main__.py"}  # the package's front door opens on every floor

MAX_FILE, MAX_FUNCTION, MAX_FOLDER = 400, 60, 16
EXCEPTIONS: dict[str, str] = {"cli": "one file a verb: who looks for a verb finds its file by its name"}
"""Folder, file, or file:function, over its budget -> why that is better than cutting it."""

EXTRAS = {
    "datasets",
    "fastapi",
    "huggingface_hub",
    "llguidance",
    "lm_eval",
    "math_verify",
    "reasoning_gym",
    "tensorboard",
    "trackio",
    "uvicorn",
    "wandb",
}
BASES = {"Config", "FinemoeError", "RunError", "MethodConfig", "ConversationsConfig", "TrainableConfig", "Weighted"}
"""The classes of ours that others derive from."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def package_of(name: str) -> str:
    return name.split("/")[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its absolute name, with its line; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def imports_that_run(tree: ast.AST) -> Iterator[str]:
    """The names that `imports` gives, without those that are for type checkers alone."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in for_types:
            yield from (module for module, _ in imports(node))


def file_of(module: str) -> str | None:
    """The file of ours that `finemoe.package.module.name` lies in."""
    parts = module.split(".")
    if parts[0] != "finemoe":
        return None
    for end in range(len(parts), 1, -1):
        for name in ("/".join(parts[1:end]) + ".py", "/".join([*parts[1:end], "__init__.py"])):
            if name in FILES:
                return name
    return None


def rooms_of(folder: str) -> dict[str, set[str]]:
    """What lies in a folder of the package, files and folders, each with those of its neighbours that it imports."""

    def room(name: str) -> str:
        return name.removeprefix(f"{folder}/").split("/")[0]

    rooms: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        if name.startswith(f"{folder}/"):
            used = {file for module in imports_that_run(tree) if (file := file_of(module)) is not None}
            neighbours = {room(file) for file in used if file.startswith(f"{folder}/")}
            rooms.setdefault(room(name), set()).update(neighbours - {room(name)})
    return rooms


def circle_in(rooms: Mapping[str, set[str]]) -> list[str]:
    """What imports each other in a circle, itself or through others; empty where all arrows can point down."""
    left = {name: set(used) for name, used in rooms.items()}
    while lowest := [name for name, used in left.items() if not used & left.keys()]:
        for name in lowest:
            del left[name]
    return sorted(left)


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def calls(tree: ast.AST, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node


def ours(module: str) -> str | None:
    """The package on a floor that `finemoe.package.module` lies in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "finemoe" and len(parts) > 1 else None


def test_every_package_has_a_floor() -> None:
    packages = {package_of(name) for name in FILES} - FRONT
    assert packages <= set(FLOORS), "a new package needs a floor"


@pytest.mark.parametrize("name", [name for name in FILES if name not in FRONT])
def test_imports_go_down(name: str) -> None:
    own = package_of(name)
    upward = [
        f"line {line}: {module}"
        for module, line in imports(TREES[name])
        if (other := ours(module)) is not None and other != own and FLOORS.get(other, 99) >= FLOORS[own]
    ]
    assert not upward, f"{own} is on floor {FLOORS[own]} and may import lower floors only"


@pytest.mark.parametrize("folder", sorted({str(Path(name).parent) for name in FILES} - {"."}))
def test_no_circle_of_imports_in_a_folder(folder: str) -> None:
    assert not circle_in(rooms_of(folder)), "these import each other in a circle, or what does"


def test_a_circle_of_imports_is_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", INNER_FLOORS)
def test_rooms_of_a_package_import_lower_ones(package: str) -> None:
    floors = {room: floor for floor, rooms in enumerate(INNER_FLOORS[package]) for room in rooms}
    found = rooms_of(package)
    assert found.keys() - {"__init__.py"} == floors.keys(), "a new room needs a floor"
    upward = [
        f"{room} imports {used}"
        for room, neighbours in found.items()
        for used in neighbours
        if room not in FRONT and floors.get(used, 99) >= floors[room]
    ]
    assert not upward, f"rooms of {package} may import lower ones only"


def test_imports_are_absolute() -> None:
    relative = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_transformers_is_imported_by_the_witness_alone() -> None:
    found = {n for n, tree in TREES.items() for module, _ in imports(tree) if module.split(".")[0] == "transformers"}
    assert found == {"checkpoint/proof/witness.py"}  # a script, run in a process of its own (decision 0008)


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_optional_dependency_is_imported_by_one_module_and_late(extra: str) -> None:
    users = [name for name, tree in TREES.items() for module, _ in imports(tree) if module.split(".")[0] == extra]
    assert len(set(users)) <= 1
    at_import = [
        name
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module, _ in imports(node)
        if module.split(".")[0] == extra and not name.startswith("server/")
    ]
    assert not at_import


def test_only_parallel_and_run_state_know_torch_distributed() -> None:
    found = {name for name, tree in TREES.items() for module, _ in imports(tree) if "torch.distributed" in module}
    found |= {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    }
    assert {name for name in found if package_of(name) != "parallel" and "run_state" not in name} == set()


def test_the_model_reads_and_writes_no_file() -> None:
    banned = {
        "io",
        "json",
        "os",
        "pathlib",
        "pickle",
        "safetensors",
        "shutil",
        "socket",
        "subprocess",
        "tempfile",
    }
    found = [
        f"{name}: {module}"
        for name, tree in TREES.items()
        if package_of(name) == "model"
        for module, _ in imports(tree)
        if module.split(".")[0] in banned
    ]
    found += [name for name, tree in TREES.items() if package_of(name) == "model" for _ in calls(tree, "open")]
    assert not found


def test_model_objects_change_no_attribute_after_construction() -> None:
    # Values flow, modules do not remember: counters kept by forward count twice under recomputation.
    found = [
        f"{name}:{target.lineno} {ast.unparse(target)}"
        for name, tree in TREES.items()
        if package_of(name) == "model"
        for function in functions(tree)
        if function.name != "__init__"
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    ]
    assert not found


def test_backends_alone_ask_whether_native_kernels_take_the_tensors_at_hand() -> None:
    # A module holds one backend and calls its operations: a second way to reach C++ would forget `kernels.products`.
    files = {name: path for name, path in FILES.items() if not name.startswith("model/native/")}
    found = {name for name in files for node in ast.walk(TREES[name]) if "usable" in imported_or_named(node)}
    assert found == {"model/backends.py"}
    calling = {name for name in files if "torch.ops" in files[name].read_text(encoding="utf-8")}
    assert calling <= {"core/extension.py"}
    # What rounds nothing is no choice, and asks for itself; whether there are kernels at all anybody may know.
    reached = {(name, module) for name in files for module, _ in imports(TREES[name]) if ".model.native" in module}
    allowed = ("finemoe.model.native.exact", "finemoe.model.native", "finemoe.model.native.available")
    others = {pair for pair in reached if pair[0] != "model/backends.py" and not pair[1].startswith(allowed[:1])}
    assert {module for _, module in others} <= set(allowed)


def imported_or_named(node: ast.AST) -> set[str]:
    """What a node imports from the native package, or reads of it."""
    if isinstance(node, ast.ImportFrom) and node.module == "finemoe.model.native":
        return {alias.name for alias in node.names}
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "native":
        return {node.attr}
    return set()


def test_only_the_command_line_prints_to_standard_output() -> None:
    found = [
        f"{name}:{call.lineno}"
        for name, tree in TREES.items()
        if package_of(name) != "cli"
        for call in calls(tree, "print")
        if all(keyword.arg != "file" for keyword in call.keywords)
    ]
    assert not found


def test_nothing_is_dispatched_on_hasattr() -> None:
    assert not [f"{name}:{call.lineno}" for name, tree in TREES.items() for call in calls(tree, "hasattr")]


def test_concrete_classes_are_not_subclassed() -> None:
    classes = [
        (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    bases = {node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases] for _, node in classes}
    abstract = BASES | {name for name, parents in bases.items() if {"Protocol", "ABC"} & set(parents)}
    found = [
        f"{name}: {node.name}({base})"
        for name, node in classes
        for base in bases[node.name]
        if base in bases and base not in abstract
    ]
    assert not found


@pytest.mark.parametrize("name", FILES)
def test_budgets(name: str) -> None:
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    over = [f"{name} {lines} lines"] if lines > MAX_FILE and name not in EXCEPTIONS else []
    for function in functions(TREES[name]):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION and f"{name}:{function.name}" not in EXCEPTIONS:
            over.append(f"{name}:{function.name} {length} lines")
    assert not over


def modules_in(folder: str) -> int:
    return sum(Path(name).parent.as_posix() == folder and Path(name).name != "__init__.py" for name in FILES)


@pytest.mark.parametrize("folder", sorted({Path(name).parent.as_posix() for name in FILES}))
def test_rooms_are_not_crowded(folder: str) -> None:
    assert modules_in(folder) <= MAX_FOLDER or folder in EXCEPTIONS


def test_every_exception_from_the_budgets_is_still_needed() -> None:
    for entry in EXCEPTIONS:
        name, _, wanted = entry.partition(":")
        if "." not in name:
            assert modules_in(name) > MAX_FOLDER, entry
            continue
        assert name in FILES, entry
        if wanted:
            lengths = [(f.end_lineno or 0) - f.lineno + 1 for f in functions(TREES[name]) if f.name == wanted]
            assert max(lengths, default=0) > MAX_FUNCTION, entry
        else:
            assert len(FILES[name].read_text(encoding="utf-8").splitlines()) > MAX_FILE, entry


@pytest.mark.parametrize("name", FILES)
def test_modules_and_public_names_have_docstrings(name: str) -> None:
    tree = TREES[name]
    bare = [] if ast.get_docstring(tree) else [name]
    definitions = [node for node in tree.body if isinstance(node, ast.ClassDef | FunctionNode)]
    for node in definitions:
        if node.name.startswith("_"):
            continue
        members = node.body if isinstance(node, ast.ClassDef) else []
        public = [m for m in members if isinstance(m, FunctionNode) and not m.name.startswith("_")]
        bare += [f"{name}: {n.name}" for n in (node, *public) if not ast.get_docstring(n)]
    assert not bare


@pytest.mark.parametrize("module", ["finemoe", "finemoe.cli.main"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    if module == "finemoe.cli.main" and "cli/main.py" not in FILES:
        pytest.skip("no command line yet")
    heavy = ("torch", "altair", "pyarrow", "scipy", "tokenizers")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not RECIPES, reason="no recipe yet")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_toml(path: Path) -> None:
    assert read_toml(path)
