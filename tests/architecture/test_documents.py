"""What the documents promise: files that are linked exist, commands parse, recipes resolve, examples run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_architecture import FLOORS
from typer.main import get_command

from finemoe.charts.paper.words import summary_markdown
from finemoe.cli.main import app
from finemoe.core.config import read_toml, to_json
from finemoe.core.errors import CheckpointError
from finemoe.methods import METHODS
from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.runs.config import resolve_run
from finemoe.runs.planning.stages import stages_of
from finemoe.studies.arms import solve
from finemoe.studies.config import resolve_comparison

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
RECIPES = sorted(ROOT.glob("recipes/**/*.toml"))


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for named, block in found if named == language]


def commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        for block in blocks(path, ""):
            lines = (line.split("#")[0].strip() for line in block.splitlines())
            found += [line for line in lines if line.startswith("finemoe ")]
    return sorted(set(found))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_imports_in_examples_work(path):
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(alias.name in vars(module) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("command", commands())
def test_documented_commands_parse(command):
    group = get_command(app)
    _, verb, *arguments = shlex.split(command)
    assert verb in group.commands, command
    found = group.commands[verb]
    if arguments and arguments[0] in getattr(found, "commands", {}):  # finemoe analyze VERB
        found, (verb, *arguments) = found.commands[arguments[0]], arguments
    found.make_context(verb, arguments, resilient_parsing=False)
    for argument in arguments:
        if argument.startswith("recipes/"):
            assert (ROOT / argument).exists(), command


@pytest.mark.parametrize(("of", "numbers"), [("distribution", range(1, 17)), ("post-training", range(11, 16))])
def test_every_complaint_has_a_test_that_says_so(of, numbers):
    """The table names tests, and each has the number in its docstring."""
    table = (ROOT / "docs/testing.md").read_text().partition(f"| complaint of {of} |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \|.*?\| (`test_\w+\.py::.*) \|$", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(numbers)
    for number, tests in rows:
        for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", tests):
            (path,) = ROOT.glob(f"tests/**/{file}")
            functions = [one for one in ast.parse(path.read_text()).body if isinstance(one, ast.FunctionDef)]
            said = {one.name: ast.get_docstring(one) or "" for one in functions}[name]
            (listed,) = re.findall(rf"Complaints? ([\d, and]+) of {of}", said)
            assert number in re.findall(r"\d+", listed), f"{file}::{name}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_resolve(path, tmp_path):
    raw = read_toml(path)
    if "stage" in raw:
        first, *others = stages_of(raw, str(path), tmp_path)
        begun = resolve_run(dict(first.raw), str(path))
        for stage in others:  # each with a model like the first stage's in the place of that with which it begins
            if "start_from" in stage.raw:
                stands_in = Path(stage.raw["start_from"])
                stands_in.mkdir(exist_ok=True)
                (stands_in / "config.json").write_text(to_json(begun))
            assert stage.sampling or resolve_run(dict(stage.raw), str(path)).method.kind in METHODS
        return
    if "start_from" in raw:  # a model of the user's own: any will do
        (tmp_path / "config.json").write_text(to_json(resolve_run(read_toml(ROOT / "recipes/tiny.toml"), "tiny")))
        raw["start_from"] = str(tmp_path)
        assert resolve_run(raw, str(path)).method.kind in METHODS
        return
    if "model" in raw:
        assert resolve_run(raw, str(path)).training.total_steps > 0
        return
    config = resolve_comparison(raw, str(path))
    length = config.data.sequence_length
    for name in config.arms:
        arm = solve(name, config.base, config.matching, config.routing, length)
        assert all(miss is None or abs(miss) < 2 for miss in arm.mismatch.values()), (name, arm.mismatch)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_begin_with_a_header(path):
    assert path.read_text(encoding="utf-8").startswith("# "), "say on which machine it ran and what came out"


def test_the_papers_in_miniature_are_those_recorded():
    """Every row of the document's table is a row of the recorded study, and none is left out."""
    recorded = (ROOT / "benchmarks/results/paper-tiny/summary.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/paper-tiny/results.json").read_text(encoding="utf-8"))
    assert summary_markdown(results) == recorded
    assert recorded in (ROOT / "docs/paper-in-miniature.md").read_text(encoding="utf-8")


def test_reasoning_in_miniature_is_what_was_recorded():
    """The counts, and every row but for the column that no claim of it fills."""
    page = (ROOT / "docs/paper-in-miniature.md").read_text(encoding="utf-8")
    counted = []
    for name in ("reasoning", "r1"):
        folder = ROOT / "benchmarks/results" / name
        recorded = (folder / "summary.md").read_text(encoding="utf-8")
        assert summary_markdown(json.loads((folder / "results.json").read_text(encoding="utf-8"))) == recorded
        rows = [line.split(" | ") for line in recorded.splitlines() if line.startswith("| ")]
        for cells in rows:
            assert cells[5] in ("–", "On training text")
            assert " | ".join(cells[:5] + cells[6:]) in page
        count = recorded.splitlines()[0]
        assert count in page
        found = re.fullmatch(r"Of (\d+) claims: (\d+) reproduced and (\d+) undecided\.", count)
        counted.append([int(one) for one in found.groups()])
    claims, reproduced, undecided = map(sum, zip(*counted, strict=True))
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert f"{claims} claims about reasoning" in results
    assert f"({reproduced} reproduced, {undecided} undecided)" in results
    howto = (ROOT / "docs/howto/teach-to-reason.md").read_text(encoding="utf-8")
    assert f"{counted[0][0]} claims are judged" in howto


def test_readme_recipe_resolves():
    import tomllib

    (block,) = blocks(ROOT / "README.md", "toml")
    config = resolve_run(tomllib.loads(block), "README.md")
    assert config.model.blocks[-1].feed_forward.num_routed_experts == 31


def test_the_router_of_the_howto_routes():
    (block,) = blocks(ROOT / "docs/howto/add-a-router.md", "python")
    names: dict = {"__name__": "sign"}
    exec(compile(block, "sign.py", "exec", dont_inherit=True), names)
    router = names["SignRouter"](names["SignConfig"](), 8, 6, 2, 32)
    torch.nn.init.normal_(router.weight)
    allowed = torch.tensor([True, True, True, False, False, False])
    hidden, tokens = torch.randn(10, 8), torch.zeros(10, dtype=torch.int64)
    decision = router(hidden, tokens, RoutingConstraint(allowed=allowed))
    assert decision.expert_ids.shape == (10, 2)
    assert decision.expert_ids.max() < 3
    assert sum(p.numel() for p in router.parameters()) == names["SignConfig"]().num_parameters(8, 6)


def test_the_family_of_the_howto_reads_back_what_it_writes():
    (block,) = blocks(ROOT / "docs/howto/add-a-family.md", "python")
    names: dict = {"__name__": "moonstone"}
    exec(compile(block, "moonstone.py", "exec", dont_inherit=True), names)
    family = names["FAMILY"]
    raw = {"model_type": "moonstone", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    raw |= {"num_attention_heads": 4, "head_dim": 12, "num_key_value_heads": 2, "moe_intermediate_size": 8}
    raw |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "vocab_size": 50}
    config = family.to_config(raw)
    assert config.moe_layers == (1, 2)
    assert family.to_config(family.from_config(config)) == config
    keys = {placement.theirs for placement in family.placements(config)}
    assert {"model.layers.1.moe.always_on.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"} <= keys
    table = config.model_dump()
    for moved in table["blocks"]:
        moved["attention"]["rotary_dim"] = 6  # a setting that the page's writer knows nothing of
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.attention\.rotary_dim 6"):
        family.from_config(ModelConfig.model_validate(table))


def test_the_router_of_the_how_to_works_in_a_recipe(tmp_path):
    """The file and the line that the page asks for, put into a copy of the package."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    routers = tmp_path / "src/finemoe/model/moe/routers"
    (routers / "sign.py").write_text(blocks(ROOT / "docs/howto/add-a-router.md", "python")[0])
    table = (routers / "__init__.py").read_text()
    table = table.replace(
        "ROUTERS: ", "from finemoe.model.moe.routers.sign import SignConfig, SignRouter\n\nROUTERS: ", 1
    )
    (routers / "__init__.py").write_text(table.replace("] = {\n", '] = {\n    "sign": (SignConfig, SignRouter),\n', 1))
    code = """
import torch
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer

def model(**balance):
    layer = {"router": {"kind": "sign"}, "balance": {"expert": 0.0, **balance}}
    return Transformer(expand(resolve({"preset": "tiny-moe", "feed_forward": layer}, "recipe")))

made = model(sequence=0.1)
initialize(made, seed=0)
made(torch.zeros(1, 4, dtype=torch.int64)).routing[0].balance["sequence"].backward()
assert made.blocks[0].feed_forward.router.weight.grad.any()
try:
    model(expert=0.1)
except Exception as error:
    assert "balance.expert needs scores that sum to 1" in str(error), error
else:
    raise SystemExit("accepted")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_pictures_are_those_of_the_source():
    """Drawn again they are the same, and they show the packages that there are, on their floors."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/pictures/draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, made in draw.PICTURES.items():
        assert made() == (ROOT / "docs/pictures" / name).read_text(encoding="utf-8"), (
            f"run docs/pictures/draw.py: {name}"
        )
    packages = {path.parent.name for path in (ROOT / "src/finemoe").glob("*/__init__.py")}
    drawn = {package: floor for floor, rooms in enumerate(draw.FLOORS) for package, _ in rooms}
    assert drawn == {package: FLOORS[package] for package in packages}


def test_the_task_of_the_how_to_is_asked(tmp_path):
    """The file and the line that the page asks for, put into a copy of the package; then the page's own command."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    tasks = tmp_path / "src/finemoe/evaluation/tasks"
    page = ROOT / "docs/howto/add-a-task.md"
    (tasks / "science.py").write_text(blocks(page, "python")[0])
    table = (tasks / "__init__.py").read_text()
    imported = "from finemoe.evaluation.tasks.science import SCIENCE\n"
    table = table.replace("\n__all__", imported + "\n__all__", 1).replace("(*LANGUAGE,", "(*SCIENCE, *LANGUAGE,", 1)
    (tasks / "__init__.py").write_text(table)
    sets = tmp_path / "sets/SciQ"
    sets.mkdir(parents=True)
    row = {"question": "What gas do plants take in?", "correct_answer": "carbon dioxide", "support": "Plants grow."}
    row |= {"distractor1": "oxygen", "distractor2": "helium", "distractor3": "neon"}
    rows = [row, {**row, "question": "Which melts last?"}, {"question": "What is missing here?"}]
    (sets / "test.json").write_text(json.dumps(rows))
    command = next(c for block in blocks(page, "") for c in block.splitlines() if "--show" in c)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sciq SciQ/test.json:1: requests 4, worked examples 0" in done.stdout, done.stdout
    assert "Question: What gas do plants take in?\nAnswer:" in done.stdout
    assert "' carbon dioxide'" in done.stdout
    code = """
from pathlib import Path
from finemoe.evaluation.task import Scored
from finemoe.evaluation.tasks import TASKS

task = TASKS["sciq"]
items, skipped = task.items(Path("sets"), None, None)
assert (len(items), skipped) == (2, 1), (items, skipped)
answers = [Scored(value, 2, False) for value in (-3.0, -4.0, -5.0, -6.0)]
assert task.judge(items[0], answers).scores["accuracy"] == 1.0
assert task.judge(items[0], answers[::-1]).scores["accuracy"] == 0.0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
