"""Each error of `llmkit doctor` is made to happen: a compiler that fails, a full disk, a Hub that does not answer."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hub_server import client_of
from llmkit.planning import doctor


def run(check: str, **environment: str) -> list[doctor.Finding]:
    """The findings of one check in a process of its own, for libraries read the environment once."""
    code = f"from llmkit.planning import doctor; print(list(doctor.{check}()))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
    environment = {name: value for name, value in environment.items() if value}  # "" takes a variable away
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.splitlines()[-1], vars(doctor))


def test_a_compiler_that_fails_is_a_warning(tmp_path):
    bad = tmp_path / "g++"
    bad.write_text("#!/bin/sh\nexit 1\n")
    bad.chmod(0o755)
    (found,) = run("compiler", CXX=str(bad), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), CUDA_VISIBLE_DEVICES="")
    assert found.state == doctor.WARNING
    assert "torch_compile: false" in found.fix


def test_a_disk_without_space_is_an_error(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True)
    if done.returncode:
        pytest.skip("this machine does not let a test mount a disk")
    try:
        (found,) = doctor.disk(mount / "runs" / "deep")
    finally:
        subprocess.run(["umount", mount], check=True)
    assert found.state == doctor.ERROR
    assert "No space left on device" in found.text


def test_a_limit_on_files_is_an_error(tmp_path):
    """RLIMIT_FSIZE, with which shells and batch systems keep a process from writing large files."""
    code = (
        "import resource, pathlib, sys; from llmkit.planning import doctor; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        "print(list(doctor.disk(pathlib.Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    (found,) = eval(done.stdout.splitlines()[-1], vars(doctor))
    assert found.state == doctor.ERROR and "cannot write 64 MB (File too large)" in found.text


def test_a_disk_with_space_tells_its_speed(tmp_path):
    (found,) = doctor.disk(tmp_path / "not" / "there" / "yet")
    assert found.state in (doctor.OK, doctor.WARNING)
    assert "MB/s" in found.text and list(tmp_path.iterdir()) == []


def hub_with(token: str, address: str, folder: Path) -> list[doctor.Finding]:
    with client_of(address, folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        return list(doctor.hub())


@pytest.mark.parametrize("token", ["", "hf_some"])
def test_a_hub_that_does_not_answer(tmp_path, token):
    (found,) = hub_with(token, "http://127.0.0.1:9", tmp_path)
    assert found.state == doctor.WARNING and "cannot be reached" in found.text


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub that knows one token."""

    def do_GET(self):
        known = self.headers.get("Authorization") == "Bearer hf_good"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(b'{"name": "ada", "type": "user"}' if known else b"{}")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("token", "state", "text"),
    [("hf_good", "ok", "logged in as ada"), ("hf_bad", "warning", "refuses the token"), ("", "warning", "nobody")],
)
def test_who_is_logged_in(tmp_path, token, state, text):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        (found,) = hub_with(token, endpoint, tmp_path)
    finally:
        server.shutdown()
    assert found.state == state and text in found.text


def test_no_login_for_wandb(tmp_path):
    places = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "", "WANDB_MODE": ""}
    (found,) = run("wandb_login", **places)
    assert found.state == doctor.WARNING and "nobody is logged in" in found.text


def test_versions_outside_the_tested_range(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["torch>=99", "nowhere-to-be-found>=1", "numpy>=1"])
    found = list(doctor.python_and_packages())[-1]
    assert found.state == doctor.WARNING
    assert "torch" in found.text and "nowhere-to-be-found>=1 is missing" in found.text and "numpy" not in found.text


def test_a_gpu_build_without_a_driver():
    import torch

    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("needs PyTorch's CUDA build on a machine without a GPU")
    (found,) = doctor.cuda_build()
    assert found.state == doctor.ERROR and "finds no GPU" in found.text


def test_a_recipe_brings_its_own_lines(capsys, monkeypatch):
    from llmkit import cli
    from llmkit.planning import recipe_checks
    from llmkit.recipe_kinds import PRETRAIN

    asked = []
    monkeypatch.setattr(doctor, "examine", lambda folder: iter([doctor.Finding("a", doctor.OK, str(folder))]))

    def examine_recipe(kind, recipe):
        asked.append((kind, recipe[-1].max_steps))
        yield doctor.Finding("b", doctor.ERROR, "no model")

    monkeypatch.setattr(recipe_checks, "examine_recipe", examine_recipe)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["doctor", "--recipe", "pretrain_quickstart", "--max_steps", "7"])
    assert asked == [(PRETRAIN, 7)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("runs/pretrain_quickstart") and lines[1].split() == ["b", "error", "no", "model"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "--recipe"])
    assert "give a recipe" in capsys.readouterr().err


def test_the_command_ends_with_the_status_of_its_worst_line(capsys, monkeypatch, tmp_path):
    from llmkit import cli

    lines = [doctor.Finding("a", doctor.OK, "fine"), doctor.Finding("b", doctor.WARNING, "slow", "buy another")]
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(lines))
    cli.main(["doctor", "--output_dir", str(Path(tmp_path))])
    assert "to fix it: buy another" in capsys.readouterr().out
    lines.append(doctor.Finding("c", doctor.ERROR, "broken"))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["doctor"])
