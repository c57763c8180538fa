"""`llmkit shards prepare --executor`: datatrove runs the tasks, here, on a stub of Slurm, and on Ray."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_parts import SETTINGS, TASKS, made
from test_shards import DOCUMENTS, contents

from llmkit.cli import main
from llmkit.data.corpus import open_corpus
from llmkit.data.parts import Parts
from llmkit.data.places import LocalPlace
from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError

pytest.importorskip("datatrove", reason="the scale extra is not installed")
from llmkit.data.executors import prepare_in_tasks

OPTIONS = ["--vocab_size", "300", "--validation_fraction", "0.2", "--shard_tokens", "500"]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number, document in enumerate(DOCUMENTS[:60]):
        Path(f"texts/{number:02d}.txt").write_text(document)
    return "texts"


def prepare(output, *options):
    main(["shards", "prepare", "--text_files", "texts", "--output", output, *OPTIONS, *options])


def of_one_process(directory):
    """What its tasks make one after the other, without datatrove."""
    return contents(made(open_corpus(["texts"]), load_tokenizer("mine/tokenizer"), directory).directory)


def shards_of(directory):
    files = [*Path(directory).glob("*.bin"), Path(directory) / "manifest.json"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_local_tasks(texts, tmp_path, capsys, workers):
    prepare("mine", "--executor", "local", "--tasks", str(TASKS), "--workers", workers)
    told = capsys.readouterr().out.splitlines()[-1]
    assert shards_of("mine") == of_one_process(tmp_path / "expected")
    before = {path: path.stat().st_mtime_ns for path in Path("mine").glob("*.bin")}
    prepare("mine", "--executor", "local", "--tasks", str(TASKS))  # it is done
    assert told.endswith("for validation in mine") and capsys.readouterr().out.splitlines()[-1] == told
    assert {path: path.stat().st_mtime_ns for path in Path("mine").glob("*.bin")} == before
    prepare("mine")  # as a recipe would ask for it
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_a_task_that_failed_is_run_again_alone(texts, tmp_path, monkeypatch):
    run, attempts = Parts.prepare, []

    def fail_once(parts, task):
        attempts.append(task)
        if attempts == [0, 1]:
            raise UserError("texts/40.txt: cannot be read: no such file")
        return run(parts, task)

    monkeypatch.setattr(Parts, "prepare", fail_once)
    local = ["--executor", "local", "--tasks", str(TASKS), "--workers", "1"]
    with pytest.raises(SystemExit):
        prepare("mine", *local)
    assert not list(Path("mine").glob("*.bin")) and Path("mine/parts/00000/part.json").exists()
    prepare("mine", *local)
    assert attempts == [0, 1, 1, 2]
    assert shards_of("mine") == of_one_process(tmp_path / "expected")


class KilledOnce(Parts):
    """Parts of which one task is killed, as by a system without memory."""

    def prepare(self, task):
        mark = self.place.directory.parent / "killed"
        if task == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(task)


@pytest.mark.slow
def test_a_worker_that_was_killed_is_noticed_and_its_task_run_again(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llmkit.data.executors.Parts", KilledOnce)
    local = ["--executor", "local", "--tasks", str(TASKS), "--workers", "2"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with pytest.raises(SystemExit):
            prepare("mine", *local)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "a worker was killed" in capsys.readouterr().err.splitlines()[-1]
    prepare("mine", *local)
    assert shards_of("mine") == of_one_process(tmp_path / "expected")


@pytest.mark.slow
def test_text_that_cannot_be_read_is_one_line(texts):
    prepare("good")
    Path("texts/40.txt").write_bytes(b"fine at first\n" * 500 + b"\xff\xfe broken")
    command = [sys.executable, "-m", "llmkit", "shards", "prepare", "--text_files", "texts", "--output", "mine"]
    command += ["--executor", "local", "--tasks", "3", "--tokenizer", "good/tokenizer", *OPTIONS[2:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")
    assert "40.txt: not UTF-8 text (byte offset 7000)" in done.stderr.splitlines()[-1]


SBATCH = '''#!{python}
"""Slurm for one machine: runs each job of the array at once, the last one first."""
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open("sbatch.log", "a") as log:
    log.write(" ".join(sys.argv[1:-1]) + "\\n" + script)
exported = dict(pair.split("=") for arg in sys.argv if arg.startswith("--export=ALL,") for pair in arg.split(",")[1:])
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
for task in range(last, first - 1, -1):
    job = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_ID="17", SLURM_NODELIST="here", **exported)
    subprocess.run(["bash", sys.argv[-1]], env=job, check=True, stdout=sys.stderr)
print("Submitted batch job 17")
'''


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stubs of Slurm's commands on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": '#!/bin/bash\nexec "${@:4}"\n',  # after -l -n 1
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, program in programs.items():
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.slow
def test_slurm_runs_the_tasks_and_then_the_merge(texts, tmp_path, slurm, capsys):
    wanted = ["--slurm", "partition=cpu", "time=1:00:00", "mem-per-cpu=4G", "account=us"]
    prepare("mine", "--executor", "slurm", "--tasks", str(TASKS), "--workers", "2", *wanted)
    assert "submitted" in capsys.readouterr().out
    assert shards_of("mine") == of_one_process(tmp_path / "expected")
    log = Path("sbatch.log").read_text()
    for directive in ("array=0-2%2", "partition=cpu", "time=1:00:00", "mem-per-cpu=4G", "account=us"):
        assert f"#SBATCH --{directive}\n" in log
    assert "--dependency=afterok:17" in log  # the merge waits for all tasks


@pytest.mark.slow
def test_ray(texts, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        prepare("mine", "--executor", "ray", "--tasks", str(TASKS))
    finally:
        ray.shutdown()
    assert shards_of("mine") == of_one_process(tmp_path / "expected")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "3"], "tasks is for work in several tasks"),
        (["--executor", "local"], "tasks is missing"),
        (["--executor", "local", "--tasks", "0"], "have to be positive"),
        (["--executor", "local", "--tasks", "61"], "60 parts at most"),
        (["--executor", "local", "--tasks", "3", "--slurm", "time=1"], "slurm is for --executor slurm"),
        (["--executor", "slurm", "--tasks", "3", "--slurm", "time=1:00"], "partition is missing"),
    ],
)
def test_options_that_cannot_be_are_one_line_and_write_nothing(texts, options, message, capsys):
    with pytest.raises(SystemExit):
        prepare("mine", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and not Path("mine").exists()


def test_slurm_that_is_not_there_is_one_line(texts, monkeypatch):
    prepare("mine")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not there"):
        prepare_in_tasks(
            open_corpus(["texts"]),
            load_tokenizer("mine/tokenizer"),
            LocalPlace(Path("other")),
            executor="slurm",
            tasks=2,
            slurm=["partition=cpu", "time=1:00"],
            **SETTINGS,
        )
