"""The files that start runs on several nodes: what they say fits together, and real parsers accept their commands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from bigmac_lightning.commands.config import BigMacCLI

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs" / "launch"
GPUS, NODES = 8, 2


class _Parsed(BigMacCLI):
    """Reads a command, and runs nothing."""

    def instantiate_classes(self) -> None:
        pass

    def _add_instantiators(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        assert subcommand == "fit"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bigmac"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # as the CLI will set it


def _check_fit(arguments: list[str]) -> None:
    """That the run saves, goes on by itself, and fits its nodes."""
    given: Any = _Parsed(args=arguments).config["fit"]
    assert given["ckpt_path"] == "auto"
    assert (given["trainer"]["num_nodes"], given["trainer"]["devices"]) == (NODES, GPUS)
    callbacks = {entry["class_path"].split(".")[-1]: entry["init_args"] for entry in given["trainer"]["callbacks"]}
    assert "PipelineMonitor" in callbacks, "the run's own callbacks stay"
    saving = [entry["init_args"] for entry in given["trainer"]["callbacks"] if "ModelCheckpoint" in entry["class_path"]]
    assert saving[-1]["every_n_train_steps"]
    assert callbacks["PreemptionCheckpoint"]["dirpath"] == saving[-1]["dirpath"]


def _check_torchrun(command: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torchrun is told, whose workers then run `bigmac fit`."""
    assert command[0] == "torchrun", "a shell around it would keep signals from it"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = get_args_parser().parse_args(command[1:])
    assert (given.module, given.training_script) == (True, "bigmac_lightning.cli")
    assert (given.nnodes, given.nproc_per_node) == (str(NODES), str(GPUS))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("GROUP_WORLD_SIZE", given.nnodes)
    _check_fit(given.training_script_args)
    return given


def _check_pods(job: dict[str, Any], shutdown_timeout: int) -> dict[str, Any]:
    """That pods have time to save, are not started again in place, and have what they mount; the container."""
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= shutdown_timeout + 30
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounted["workspace"] == container["workingDir"]
    assert "/dev/shm" in mounted.values()
    return container


def _is_label(name: str) -> bool:
    return re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) is not None


def test_trainjob(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, run = yaml.safe_load_all((LAUNCH / "trainjob.yaml").read_text())
    assert {runtime["apiVersion"], run["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], run["kind"]) == ("TrainingRuntime", "TrainJob")
    assert (run["spec"]["runtimeRef"]["kind"], run["spec"]["runtimeRef"]["name"]) == ("TrainingRuntime", "bigmac")
    assert runtime["metadata"]["name"] == "bigmac"
    assert _is_label(run["metadata"]["name"])
    trainer = run["spec"]["trainer"]
    assert runtime["spec"]["mlPolicy"] == {"numNodes": trainer["numNodes"], "torch": {}}
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["maxRestarts"] > 0
    (node,) = jobs["replicatedJobs"]
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    job = node["template"]["spec"]
    assert job["backoffLimit"] == 0, "else a node would be started again alone, which a static rendezvous cannot do"
    given = {  # what Kubeflow makes of it
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "qwen3-vl-node-0-0.qwen3-vl",
        "PET_MASTER_PORT": "29400",
    }
    told = _check_torchrun(trainer["command"], given, monkeypatch)
    assert (told.rdzv_backend, told.node_rank, told.max_restarts) == ("static", 1, 0)
    assert _check_pods(job, told.shutdown_timeout)["name"] == "node"


def test_jobset(monkeypatch: pytest.MonkeyPatch) -> None:
    run = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (run["apiVersion"], run["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert run["spec"]["failurePolicy"]["maxRestarts"] > 0
    name = run["metadata"]["name"]
    (node,) = run["spec"]["replicatedJobs"]
    assert _is_label(f"{name}-{node['name']}-0-0")
    job = node["template"]["spec"]
    assert (node["replicas"], job["parallelism"], job["completions"]) == (1, NODES, NODES)
    assert job["completionMode"] == "Indexed", "pods have names"
    assert job["backoffLimit"] > 0
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]
    (container,) = job["template"]["spec"]["containers"]
    told = _check_torchrun(container["command"], {}, monkeypatch)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(told.nproc_per_node)
    assert told.rdzv_backend == "c10d"
    assert told.rdzv_endpoint == f"{name}-{node['name']}-0-0.{name}:29400"
    assert told.max_restarts >= job["backoffLimit"], "each node that is replaced costs the others a restart"
    _check_pods(job, told.shutdown_timeout)


def _commands(script: str, folder: Path, codes: dict[str, int], **environment: str) -> list[list[str]]:
    """The commands that a script runs, for which programs that only write down their arguments stand in."""
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    for name, code in codes.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >>"$LOG"; echo >>"$LOG"; exit {code}\n')
        program.chmod(0o755)
    log = folder / "log"
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", LAUNCH / script], env={"PATH": path, "LOG": str(log), **environment}, check=False)
    commands = [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]
    log.unlink()
    return commands


def test_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = _commands("torchrun.sh", tmp_path, {"torchrun": 0}, HEAD="node-a")
    told = _check_torchrun(command, {}, monkeypatch)
    assert (told.rdzv_backend, told.rdzv_endpoint, told.rdzv_id) == ("c10d", "node-a:29400", "qwen3_vl")
    assert told.max_restarts > 0
    (command,) = _commands("torchrun.sh", tmp_path, {"torchrun": 0}, HEAD="node-a", NNODES="1:2", RUN="other")
    told = get_args_parser().parse_args(command[1:])
    assert (told.nnodes, told.rdzv_id) == ("1:2", "other")


def test_slurm(tmp_path: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (str(NODES), *[str(GPUS)] * 2)
    name, seconds = options["signal"].split("@")
    assert name == "USR1", "to the processes, and not to the shell (B:); Lightning hears this one"
    assert int(seconds) >= 120
    assert {"requeue", "time"} <= options.keys()
    assert options["open-mode"] == "append"

    job = {"SLURM_JOB_ID": "7"}
    (command,) = _commands("slurm.sbatch", tmp_path, {"srun": 0, "scontrol": 0}, **job)
    start = command.index("bigmac")
    assert command[:start] == ["srun", "--kill-on-bad-exit=1"]
    assert command[start + 1] == "fit"
    _check_fit(command[start + 1 :])
    *_, again = _commands("slurm.sbatch", tmp_path, {"srun": 1, "scontrol": 0}, **job)
    assert again == ["scontrol", "requeue", "7"]
    tried = _commands("slurm.sbatch", tmp_path, {"srun": 1, "scontrol": 0}, **job, SLURM_RESTART_COUNT="10")
    assert [first for first, *_ in tried] == ["srun"]
