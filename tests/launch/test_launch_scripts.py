"""What starts nodes, run with stubs of Slurm, of SkyPilot's environment and of `accelerate`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # private: what `launch` does

ROOT = Path(__file__).parents[2]
STUBS = {
    # `accelerate` notes what it was started with, and trains until it is told to stop or as long as TRAINS says.
    "accelerate": """echo "$@" >>"$NOTES/started-$NODE_RANK"
        trap 'exit 143' TERM; sleep "$TRAINS" & wait; exit "$STATUS" """,
    # Slurm's, for a job of two nodes: `srun` runs a task on each, and `scancel` signals the tasks.
    "srun": """while [[ $1 == --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >>"$NOTES/tasks"; done
        status=0; for task in $(jobs -p); do wait $task || status=$?; done; exit $status""",
    "scancel": """echo "$@" >>"$NOTES/cancelled"; kill -TERM $(cat "$NOTES/tasks")""",
    "scontrol": """if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >>"$NOTES/asked"; fi""",
}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With the stubs on the path, and `tmp_path` as the place of what they note."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(tmp_path), "TRAINS": "0", "STATUS": "0"}
    return os.environ | variables


def slurm(environment: dict[str, str], tmp_path, **variables: str) -> subprocess.Popen:
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[a-b]"}
    job |= {"SLURM_JOB_ID": "1234567"}
    script = ["launch/slurm.sh", "recipes/pretrain.py", "--config", "a.yaml"]
    return subprocess.Popen(script, cwd=tmp_path, env=environment | job | variables)


def flags(text: str) -> dict[str, str]:
    """What a command line says, by flag."""
    parsed = launch_command_parser().parse_args(text.removeprefix("launch ").split())
    names = ("num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend")
    names += ("rdzv_conf", "max_restarts", "training_script", "training_script_args")
    return {name: getattr(parsed, name) for name in names}


EXPECTED = {"num_machines": 2, "num_processes": 16, "rdzv_backend": "c10d", "max_restarts": 3}
EXPECTED |= {"training_script": "recipes/pretrain.py"}


def test_slurm_starts_each_node_and_is_done_when_the_run_is(environment, tmp_path):
    assert slurm(environment, tmp_path).wait(timeout=30) == 0
    for node in (0, 1):
        found = flags((tmp_path / f"started-{node}").read_text())
        expected = {"machine_rank": node, "main_process_ip": "node-a", "main_process_port": 24567}
        expected |= {"rdzv_conf": f"is_host={1 - node}"}
        expected |= {"training_script_args": ["--config", "a.yaml", "--resume_from_checkpoint", "latest"]}
        assert found == EXPECTED | expected
    assert not (tmp_path / "asked").exists()


def test_slurm_saves_before_the_time_is_up_and_queues_the_job_again(environment, tmp_path):
    job = slurm(environment, tmp_path, TRAINS="60")
    while not ((tmp_path / "started-0").exists() and (tmp_path / "started-1").exists()):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=30)
    assert "--signal=TERM 1234567" in (tmp_path / "cancelled").read_text()
    assert (tmp_path / "asked").read_text() == "requeue 1234567\n"
    assert not list(tmp_path.glob("*.failures"))


def test_slurm_queues_a_failed_job_again_a_few_times(environment, tmp_path):
    for _ in range(4):
        assert slurm(environment, tmp_path, STATUS="1", FAILURES="2").wait(timeout=30) == 1
    assert (tmp_path / "asked").read_text() == "requeue 1234567\n" * 2


@pytest.mark.parametrize("node", [0, 1])
def test_skypilot_maps_its_environment(environment, tmp_path, node):
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    volume = yaml.safe_load((ROOT / "launch" / "skypilot_volume.yaml").read_text())
    assert task["volumes"] == {"/runs": volume["name"]}
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    sky |= {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "HOME": str(tmp_path)}
    run = task["run"].replace("launch/node.sh", 'echo "$PET_LOCAL_ADDR" >"$NOTES/address"; launch/node.sh')
    subprocess.run(["bash", "-c", run], cwd=ROOT, env=environment | task["envs"] | sky, check=True)
    found = flags((tmp_path / f"started-{node}").read_text())
    arguments = ["--config", "recipes/pretrain_gpt2_124m.yaml", "--output_dir", "/runs/gpt2_124m"]
    expected = {"machine_rank": node, "main_process_ip": "10.0.0.7", "main_process_port": 29500}
    expected |= {"rdzv_conf": f"is_host={1 - node}"}
    assert found == EXPECTED | expected | {"training_script_args": [*arguments, "--resume_from_checkpoint", "latest"]}
    assert (tmp_path / "address").read_text() == ("10.0.0.7\n", "10.0.0.8\n")[node]
    assert Path(ROOT / task["envs"]["RECIPE"]).exists()


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_honours_every_line_of_its_configurations(path):
    """Its flags' defaults win over some keys of a configuration, which then say nothing."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    stated = yaml.safe_load(path.read_text())
    found, _, _ = _validate_launch_command(arguments)
    kinds = {"MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp"}
    if kind := kinds.get(stated.pop("distributed_type")):
        assert getattr(found, kind)
    assert stated.pop("compute_environment") == "LOCAL_MACHINE"
    stated |= stated.pop("fsdp_config", {})
    assert {key: getattr(found, key) for key in stated} == stated
