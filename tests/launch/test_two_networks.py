"""Two nodes with a network of their own each, between which a link is cut and restored."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TINY = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--vocab_size", "300"]
TINY += ["--total_batch_tokens", "512", "--per_device_train_batch_size", "8", "--max_steps", "400", "--bf16", "false"]
TINY += ["--eval_strategy", "no", "--save_steps", "20", "--save_total_limit", "2", "--logging_steps", "20"]
TINY += ["--learning_rate", "1e-3", "--dropout", "0.1", "--ddp_timeout", "8"]


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces, named n0 and n1 with this process's number, joined by a veth pair."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace needs root")
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`: apt-get install iproute2")
    names = tuple(f"n{node}-{os.getpid()}" for node in (0, 1))
    made = ip("netns", "add", names[0], check=False)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def start(network: str, node: int, out: Path, *arguments: object) -> subprocess.Popen:
    """One node of two, as `launch/slurm.sh` starts it, with one CPU rank; its shards are on a disk of its own."""
    address = ADDRESSES[node]
    environment = {"NODES": 2, "NODE_RANK": node, "HEAD": ADDRESSES[0], "RANKS_PER_NODE": 1, "OMP_NUM_THREADS": 1}
    environment |= {"PET_LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": "wire"}  # both have the same host name
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where `accelerate` is
    command = ["ip", "netns", "exec", network, "launch/node.sh", "--config_file", "accelerate_configs/multi_cpu.yaml"]
    command += ["recipes/pretrain.py", *map(str, arguments)]
    with out.open("w") as file:
        variables = {name: str(value) for name, value in environment.items()}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=file, stderr=file)


def wait(condition, processes: list[subprocess.Popen], outs: list[Path]) -> None:
    end = time.monotonic() + 180
    while not condition():
        text = "\n".join(out.read_text() for out in outs)
        assert time.monotonic() < end and all(process.poll() is None for process in processes), text
        time.sleep(0.02)


def log_of(run: Path) -> list[dict]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{key: record[key] for key in ("step", "loss", "grad_norm")} for record in records if "loss" in record]


def start_both(networks, folder: Path, name: str) -> tuple[list[subprocess.Popen], list[Path]]:
    """A run in the folder `name`, and what its two nodes print."""
    outs = [folder / f"{name}.out{node}" for node in (0, 1)]
    nodes = []
    for node, network in enumerate(networks):
        place = ["--data_dir", folder / f"disk{node}", "--output_dir", folder / name]
        arguments = [*TINY, "--text_files", folder / "*.txt", *place, "--resume_from_checkpoint", "latest"]
        nodes.append(start(network, node, outs[node], *arguments))
    return nodes, outs


@pytest.mark.slow
def test_a_cut_link_costs_the_steps_since_the_last_checkpoint(networks, tmp_path):
    """Both ranks end, their launchers start them again, and the run ends as one whose link was never cut."""
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}.\n" for n in range(40)))
    run, whole = tmp_path / "run", tmp_path / "whole"
    nodes, outs = start_both(networks, tmp_path, "run")
    try:
        wait(lambda: (run / "checkpoint-40").exists(), nodes, outs)
        ip("-n", networks[1], "link", "set", "wire", "down")
        wait(lambda: all("nothing came for ddp_timeout=8 seconds" in out.read_text() for out in outs), nodes, outs)
        assert not (run / "checkpoint-400").exists()
        ip("-n", networks[1], "link", "set", "wire", "up")
        assert [process.wait(timeout=240) for process in nodes] == [0, 0], "\n".join(out.read_text() for out in outs)
        nodes, outs = start_both(networks, tmp_path, "whole")
        assert [process.wait(timeout=240) for process in nodes] == [0, 0], "\n".join(out.read_text() for out in outs)
    finally:
        for process in nodes:
            process.kill()
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, run))
    assert expected.keys() == found.keys() and all((expected[name] == found[name]).all() for name in expected)
    assert log_of(run) == log_of(whole) and len(log_of(run)) == 21
