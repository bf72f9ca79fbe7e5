"""Files that start a run on a cluster: a shell and a YAML parser can read them, and both start the same line."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.core.errors import ConfigError
from finemoe.parallel.planner.launching import Launch, kubernetes, shutdown_seconds, slurm, torchrun

yaml: Any = pytest.importorskip("yaml")

ODD = Launch(
    "/data/it's a recipe.toml", 3, 4, "/data/runs/a $HOME b", ("model.name='x y'", "parallel.expert=4"), "big-run"
)


def bash(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)


def line_of(script: str) -> str:
    return next(line.strip() for line in script.splitlines() if "torchrun" in line and not line.startswith("#"))


def test_bash_reads_the_sbatch_file() -> None:
    script = slurm(ODD, ["a plan:\nof two lines", "it's `quoted` $(so)"], partition="gpu", time="24:00:00")
    done = bash(script)
    assert done.returncode == 0, done.stderr
    assert bash(script.replace('"$SLURM_JOB_NODELIST"', '"')).returncode != 0
    head = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=3" in head
    assert "#SBATCH --gpus-per-node=4" in head
    assert "#SBATCH --time=24:00:00" in head
    assert "# of two lines" in script.splitlines()


def test_the_same_line_starts_both() -> None:
    job = yaml.safe_load(kubernetes(ODD, ["a plan"]))
    (args,) = job["spec"]["trainer"]["args"]
    assert args.strip().removeprefix("exec ") == line_of(slurm(ODD))
    assert bash(args).returncode == 0


def test_the_line_says_what_was_asked() -> None:
    words = shlex.split(torchrun(ODD, "HEAD", "RUN"))
    assert words[: words.index("-m")] == [
        "torchrun",
        "--nnodes=3",
        "--nproc-per-node=4",
        "--max-restarts=3",
        "--shutdown-timeout=300",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=HEAD:29500",
        "--rdzv-id=RUN",
    ]
    assert words[words.index("-m") :] == [
        "-m", "finemoe", "train", "/data/it's a recipe.toml", "--out", "/data/runs/a $HOME b", "--continue",
        "--set", "model.name='x y'", "--set", "parallel.expert=4",
    ]  # fmt: skip


def test_nothing_of_the_line_is_expanded_but_head_and_run() -> None:
    """What the shell hands to torchrun is what was asked, whatever characters are in it."""
    script = line_of(slurm(ODD)).replace("torchrun", "printf '%s\\n'", 1)
    env = {"FINEMOE_HEAD": "node1", "FINEMOE_RUN": "77", "PATH": "/usr/bin:/bin", "HOME": "/root"}
    said = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=env
    ).stdout.splitlines()
    assert "--rdzv-endpoint=node1:29500" in said
    assert "/data/runs/a $HOME b" in said


def test_a_train_job_of_kubeflow() -> None:
    job = yaml.safe_load(kubernetes(ODD, image="registry:5000/me/finemoe@sha256:ab", claim="disk"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 4)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 4
    assert {one["name"]: one["value"] for one in trainer["env"]}["FINEMOE_HEAD"] == "big-run-node-0-0.big-run"
    assert trainer["image"] == "registry:5000/me/finemoe@sha256:ab"
    assert all(isinstance(one["value"], str) for one in trainer["env"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({"restarts": -1}, "--max-restarts -1"),
        ({"shutdown": 0}, "--shutdown-timeout 0"),
        ({"port": 70000}, "--port 70000"),
        ({"name": "Bad name"}, "--name 'Bad name'"),
        ({"out": "a\nb"}, "--out"),
        ({"recipe": ""}, "recipe"),
    ],
)
def test_what_no_file_can_hold_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Launch(**{"recipe": "a.toml", "nodes": 1, "gpus_per_node": 1, "out": "o", **changes})


def test_torchrun_takes_every_option_of_the_line() -> None:
    from torch.distributed.run import get_args_parser

    words = shlex.split(torchrun(ODD, "HEAD", "RUN"))[1:]
    found = get_args_parser().parse_args(words)
    assert found.shutdown_timeout == 300
    assert found.training_script == "finemoe"


def test_the_cluster_waits_longer_than_torchrun_does() -> None:
    """A checkpoint that is being written when a job's time is over must not be cut short by either."""
    for seconds in (300, 1000):
        launch = replace(ODD, shutdown=seconds)
        script = slurm(launch)
        assert f"--shutdown-timeout={seconds} " in line_of(script)
        [lead] = [int(line.partition("@")[2]) for line in script.splitlines() if "--signal=TERM@" in line]
        assert lead == seconds + 60
        assert f"terminationGracePeriodSeconds: {seconds + 60}" in kubernetes(launch)


def test_the_time_for_saving_follows_from_the_plan() -> None:
    """A step, two checkpoints at 0.5 GB/s (one may be under way), a minute, and whole minutes of it; five at least."""
    assert shutdown_seconds(10, 1e9) == 300
    assert shutdown_seconds(29.0, 12 * 16.4e9) == 900  # 29 + 787.2 + 60
    assert shutdown_seconds(30, 1e15) == 60_000


def test_moments_in_two_bytes_make_a_checkpoint_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.toml").write_text(RECIPE + "[training]\nsteps = 10\ntokens_per_step = 16384\n")
    seen: list[float] = []
    monkeypatch.setattr("finemoe.runs.planning.launching.shutdown_seconds", lambda step, saved: seen.append(saved) or 1)
    for moments in ("fp32", "bf16"):
        how: dict[str, Any] = {"nodes": 2, "gpus_per_node": 4, "out": "/data/run", "device": "h100"}
        finemoe.launch("slurm", tmp_path / "r.toml", overrides=[f"optimizer.moments={moments}"], **how)
    assert seen[1] * 12 == seen[0] * 8


def test_words_of_the_cluster_are_single_words() -> None:
    with pytest.raises(ConfigError, match="--partition"):
        slurm(ODD, partition="a\n#SBATCH --mail")
    with pytest.raises(ConfigError, match="--image"):
        kubernetes(ODD, image="a b")


RECIPE = '[model]\npreset = "tiny-moe"\n[model.feed_forward]\nnum_routed_experts = 64\n'


def test_a_plan_goes_with_it(tmp_path: Path) -> None:
    recipe = tmp_path / "Tiny Run.toml"
    recipe.write_text(RECIPE + "[training]\nsteps = 10\ntokens_per_step = 16384\n")
    options: dict[str, Any] = {"nodes": 2, "gpus_per_node": 4, "out": "/data/run"}
    script = finemoe.launch("slurm", recipe, device="h100", overrides=["parallel.expert=2"], **options)
    assert bash(script).returncode == 0
    assert "on 8 h100, shard 8, expert 2, with a batch of 64 sequences of 256 tokens" in script
    assert "--job-name=finemoe-tiny-run" in script
    assert "--shutdown-timeout=300 " in script
    own = finemoe.launch("slurm", recipe, device="h100", overrides=["parallel.expert=2"], shutdown=77, **options)
    assert "--shutdown-timeout=77 " in own
    assert "h100" not in finemoe.launch("kubernetes", recipe, **options)
    with pytest.raises(ConfigError, match="does not divide"):
        finemoe.launch("slurm", recipe, device="h100", overrides=["parallel.expert=3"], **options)
    with pytest.raises(ConfigError, match=r"launch ray is not built.* use slurm or kubernetes"):
        finemoe.launch("ray", recipe, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="known are"):
        finemoe.launch("pbs", recipe, **options)  # type: ignore[arg-type]


def test_what_the_trainer_refuses_is_refused_before_it_waits_in_a_queue(tmp_path: Path) -> None:
    """Where the recipe lies here, with a device and without one; in the trainer's words, and by this verb's options."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE + "[training]\nsteps = 10\ntokens_per_step = 16384\n")
    options: dict[str, Any] = {"nodes": 2, "gpus_per_node": 4, "out": "/data/run"}
    wanted = ["parallel.pipeline=2", "parallel.schedule=zbv", "model.num_layers=4"]
    for device in (None, "h100"):
        with pytest.raises(ConfigError, match='schedule = "zbv" with shard x context = 4: it computes gradients'):
            finemoe.launch("slurm", recipe, device=device, overrides=wanted, **options)
        with pytest.raises(ConfigError, match="asked for: --nodes times --gpus-per-node = 3, or other sizes"):
            finemoe.launch("slurm", recipe, device=device, overrides=["parallel.shard=3"], **options)
        with pytest.raises(ConfigError, match="is 4 sequences, which 8 processes cannot share"):
            finemoe.launch("slurm", recipe, device=device, overrides=["training.tokens_per_step=1024"], **options)


def test_a_recipe_that_cannot_be_looked_at_is_launched_all_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nodes": 1, "gpus_per_node": 2, "out": "/data/run"}
    script = finemoe.launch("slurm", "/data/r.toml", **options)
    assert "# Not checked: /data/r.toml does not lie" in script
    assert "# finemoe launch slurm: 2 processes on 1 node\n" in script
    recipe = tmp_path / "r.toml"
    recipe.write_text('start_from = "/data/model"\n[training]\nsteps = 1\n')
    assert "# Not checked: /data/model" in finemoe.launch("slurm", recipe, **options)


STAGED = (
    RECIPE
    + """
[[stage]]
name = "base"
[stage.training]
steps = 1
[[stage]]
name = "zero"
start_from = "base"
[stage.method]
kind = "grpo"
template = "{prompt}"
[[stage.method.rewards]]
kind = "answer"
[stage.data]
corpus = { kind = "problems", problem = "running_sum", count = 100 }
[stage.training]
steps = 1
"""
)


def test_every_stage_is_looked_at_before_a_job_is_printed(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(STAGED)
    options: dict[str, Any] = {"nodes": 1, "out": "/data/run"}
    for kind in ("slurm", "kubernetes"):
        with pytest.raises(ConfigError, match=r"stage zero: method.kind 'grpo' .* there are 2: train it by one"):
            finemoe.launch(kind, recipe, gpus_per_node=2, **options)  # type: ignore[arg-type]
    assert "Not checked" not in finemoe.launch("slurm", recipe, gpus_per_node=1, **options)
    recipe.write_text(STAGED.partition("[stage.method]")[0] + "[stage.training]\nsteps = 1\n")
    own = finemoe.launch("slurm", recipe, gpus_per_node=2, overrides=["stage.zero.seed=3"], **options)
    assert "--set stage.zero.seed=3" in own
    assert "Not checked" not in own
    planned = finemoe.launch("slurm", recipe, gpus_per_node=2, device="h100", **options)
    assert "# This is stage 1 of 2, base" in planned
    assert "# This is stage 2 of 2, zero" in planned
    assert "plans another" not in planned, "all of them are there"


def test_a_job_that_does_not_fit_is_told_whose_options_help(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\npreset = "deepseek-moe-16b"\n[training]\nsteps = 2\n')
    options: dict[str, Any] = {"nodes": 1, "gpus_per_node": 2, "out": "/data/run", "device": "h100"}
    with pytest.raises(
        ConfigError, match=r"does not fit: .* What would: finemoe plan \S+ --gpus 2 --device h100 --set s"
    ):
        finemoe.launch("slurm", recipe, overrides=["seed=3"], **options)
