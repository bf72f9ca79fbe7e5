"""Files that start a run on a cluster: an sbatch script for Slurm, a TrainJob for Kubernetes. Text, and nothing more.

Both start one torchrun a node, which starts a process a device, meets the others at a c10d rendezvous, and starts all
again when one dies; each start takes up the newest checkpoint. The torchrun line is made once, and is the same in both.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from finemoe.core.errors import ConfigError

_PORT = 29500
MIN_SHUTDOWN, MAX_SHUTDOWN = 1, 60_000
_LEAD = 60  # seconds more, in which Slurm's signal and torchrun's come through, and processes end after saving
_WRITTEN = 0.5e9  # bytes/s of a checkpoint, put together and written by one process: a slow shared file system
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?\Z")


@dataclass(frozen=True)
class Launch:
    """A run on a cluster."""

    recipe: str
    """As the nodes see it, like `out`: a path on storage that all of them share."""
    nodes: int
    gpus_per_node: int
    out: str
    overrides: tuple[str, ...] = ()
    name: str = "finemoe"
    restarts: int = 3
    """How often all processes are started again before the job fails."""
    port: int = _PORT
    cpus_per_gpu: int = 8
    shutdown: int = 300
    """[seconds] That processes have, once they are told to stop, to finish a step and write a checkpoint."""

    def __post_init__(self) -> None:
        for field in ("nodes", "gpus_per_node", "cpus_per_gpu"):
            if getattr(self, field) < 1:
                raise ConfigError(f"--{field.replace('_', '-')} {getattr(self, field)}: at least one")
        if not MIN_SHUTDOWN <= self.shutdown <= MAX_SHUTDOWN:
            raise ConfigError(
                f"--shutdown-timeout {self.shutdown}: must be from {MIN_SHUTDOWN} to {MAX_SHUTDOWN:,} seconds"
            )
        if self.restarts < 0:
            raise ConfigError(f"--max-restarts {self.restarts}: must not be below 0")
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port {self.port}: must be from 1 to 65535")
        if not _NAME.match(self.name):
            raise ConfigError(f"--name {self.name!r}: use small letters, digits and dashes, at most 63, a letter first")
        for what, text in (("recipe", self.recipe), ("--out", self.out), *(("--set", one) for one in self.overrides)):
            if not text or not text.isprintable():
                raise ConfigError(f"{what} {text!r}: must be text on one line")

    @property
    def processes(self) -> int:
        """One a device."""
        return self.nodes * self.gpus_per_node


def shutdown_seconds(step: float, checkpoint: float) -> int:
    """[seconds] To finish a step, the checkpoint that is being written and a last one, in whole minutes; five at least.

    Args:
        step: [seconds] at most.
        checkpoint: [bytes].
    """
    needed = step + 2 * checkpoint / _WRITTEN + _LEAD
    return min(MAX_SHUTDOWN, max(300, 60 * math.ceil(needed / 60)))


def torchrun(launch: Launch, endpoint: str, identity: str) -> str:
    """The line that every node runs, quoted for a shell.

    Args:
        launch: the run.
        endpoint: host of the rendezvous, as a shell expands it; double quotes are put around it.
        identity: of the run among others at that host, likewise.
    """
    train = ["-m", "finemoe", "train", launch.recipe, "--out", launch.out, "--continue"]
    for override in launch.overrides:
        train += ["--set", override]
    options = [
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={launch.gpus_per_node}",
        f"--max-restarts={launch.restarts}",
        f"--shutdown-timeout={launch.shutdown}",
        "--rdzv-backend=c10d",
        f'--rdzv-endpoint="{endpoint}:{launch.port}"',
        f'--rdzv-id="{identity}"',
    ]
    return " ".join(["torchrun", *options, *map(shlex.quote, train)])


def slurm(launch: Launch, notes: Sequence[str] = (), partition: str | None = None, time: str | None = None) -> str:
    """An sbatch script.

    Args:
        launch: the run.
        notes: lines of a plan, as comments.
        partition, time: for `#SBATCH`, where the cluster wants them.

    Raises:
        ConfigError: a partition or time that is no single word.
    """
    for option, text in (("--partition", partition), ("--time", time)):
        if text is not None and not re.fullmatch(r"[\w:,.-]+", text):
            raise ConfigError(f"{option} {text!r}: must be one word, as sbatch takes it")
    wanted = [f"#SBATCH --partition={partition}"] * (partition is not None)
    wanted += [f"#SBATCH --time={time}"] * (time is not None)
    line = torchrun(launch, "$FINEMOE_HEAD", "$FINEMOE_RUN")
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={launch.name}",
        f"#SBATCH --nodes={launch.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={launch.gpus_per_node}",
        f"#SBATCH --cpus-per-task={launch.gpus_per_node * launch.cpus_per_gpu}",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        f"#SBATCH --signal=TERM@{launch.shutdown + _LEAD}",
        *wanted,
        *_comments(notes),
        f"# {launch.shutdown + _LEAD} s before its time is over the job is told to stop; it may save for "
        f"{launch.shutdown} s of them.",
        "",
        "set -euo pipefail",
        'FINEMOE_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "FINEMOE_RUN=$SLURM_JOB_ID",
        "export FINEMOE_HEAD FINEMOE_RUN",
        f"export OMP_NUM_THREADS={launch.cpus_per_gpu}",
        "# One torchrun a node. A node that fails takes the step down; --requeue brings the job back, to --continue.",
        "srun --kill-on-bad-exit=1 \\",
        f"  {line}",
        "",
    ]
    return "\n".join(lines)


def kubernetes(launch: Launch, notes: Sequence[str] = (), image: str = "finemoe:latest", claim: str = "finemoe") -> str:
    """A Kubeflow TrainJob (trainer.kubeflow.org/v1alpha1) as YAML.

    Args:
        launch: the run.
        notes: lines of a plan, as comments.
        image: with finemoe and torch.
        claim: volume claim that every node mounts at /data, where recipe and output lie.

    Raises:
        ConfigError: an image or claim that is no single word.
    """
    for option, text in (("--image", image), ("--claim", claim)):
        if not re.fullmatch(r"[\w./:@-]+", text):
            raise ConfigError(f"{option} {text!r}: must be one word")
    line = torchrun(launch, "$FINEMOE_HEAD", "$FINEMOE_RUN")
    head = f"{launch.name}-node-0-0.{launch.name}"
    lines = [
        *_comments(notes),
        f"# A pod that is deleted has {launch.shutdown} s to save in only if the runtime's pod template says",
        f"# terminationGracePeriodSeconds: {launch.shutdown + _LEAD}. A TrainJob cannot say it; 30 is what pods have.",
        "apiVersion: trainer.kubeflow.org/v1alpha1",
        "kind: TrainJob",
        "metadata:",
        f"  name: {launch.name}",
        "spec:",
        "  runtimeRef:",
        "    name: torch-distributed",
        "  trainer:",
        f"    image: {image}",
        f"    numNodes: {launch.nodes}",
        f"    numProcPerNode: {launch.gpus_per_node}",
        "    resourcesPerNode:",
        "      limits:",
        f"        nvidia.com/gpu: {launch.gpus_per_node}",
        "    env:",
        *_variables({"FINEMOE_HEAD": head, "FINEMOE_RUN": launch.name, "OMP_NUM_THREADS": str(launch.cpus_per_gpu)}),
        '    command: ["/bin/bash", "-c"]',
        "    args:",
        "      - |",
        f"        exec {line}",
        "  podTemplateOverrides:",
        "    - targetJobs:",
        "        - name: node",
        "      spec:",
        "        containers:",
        "          - name: node",
        "            volumeMounts:",
        "              - name: data",
        "                mountPath: /data",
        "        volumes:",
        "          - name: data",
        "            persistentVolumeClaim:",
        f"              claimName: {claim}",
        "",
    ]
    return "\n".join(lines)


def _variables(values: dict[str, str]) -> list[str]:
    return [line for name, value in values.items() for line in (f"      - name: {name}", f'        value: "{value}"')]


def _comments(notes: Sequence[str]) -> list[str]:
    return [f"# {line}" for note in notes for line in note.splitlines()]
