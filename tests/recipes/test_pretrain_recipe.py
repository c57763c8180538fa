"""`accelerate launch recipes/pretrain.py` as users run it: one rank and two, two nodes, killed, resumed, wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ranks import on_ranks, start
from small_run import accelerate_launch, logged, refusal, rounding, run_recipe, write_sums

ROOT = Path(__file__).parents[2]
TINY = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--vocab_size", "300"]
TINY += ["--total_batch_tokens", "512", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"]
TINY += ["--max_steps", "8", "--eval_steps", "4", "--save_steps", "4", "--logging_steps", "1", "--bf16", "false"]
TINY += ["--learning_rate", "1e-3"]  # higher ones blow up rounding, which differs between one rank and two


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_sums(tmp_path_factory.mktemp("texts"))


def command(config: str, *arguments: object, launcher: tuple = ()) -> list[str]:
    return [*accelerate_launch(config), *launcher, "recipes/pretrain.py", *map(str, arguments)]


def launch(config: str, *arguments: object, launcher: tuple = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(config, *arguments, launcher=launcher), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def one_rank(texts, tmp_path_factory) -> Path:
    """A whole run on one rank."""
    run = tmp_path_factory.mktemp("runs") / "one"
    done = launch("cpu", *TINY, "--text_files", texts / "*.txt", "--data_dir", texts / "data", "--output_dir", run)
    assert done.returncode == 0, done.stderr
    assert "8 steps = 4,096 tokens" in done.stdout and f"saved {run}" in done.stdout
    return run


WITHOUT_LLMKIT = """
import sys
sys.modules["llmkit"] = None  # importing it raises
import transformers
for checkpoint in sys.argv[1:]:
    generate = transformers.pipeline("text-generation", checkpoint)
    assert type(generate.model).__module__.startswith("transformers.")
    print(repr(generate("7 times 3 is", max_new_tokens=8, do_sample=False)[0]["generated_text"]))
"""


def test_every_checkpoint_opens_without_llmkit(one_rank):
    """Mid-run and final: `pipeline` without llmkit gives the text that our own model gives."""
    from transformers import AutoTokenizer

    from llmkit import GPT2LMHeadModel

    checkpoints = one_rank / "checkpoint-4", one_rank
    done = subprocess.run([sys.executable, "-c", WITHOUT_LLMKIT, *checkpoints], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for checkpoint, said in zip(checkpoints, done.stdout.splitlines(), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        ids = tokenizer("7 times 3 is", return_tensors="pt")
        model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
        output = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
        assert said == repr(tokenizer.decode(output, skip_special_tokens=True))
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["model_type"] == "gpt2" and config["vocab_size"] == 300 and config["use_cache"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_ranks_train_what_one_trains(one_rank, texts, tmp_path, nodes):
    """Two ranks of one machine, then two machines of one rank: half the accumulation, the same losses.

    They start without shards together: on one machine one of them makes these and the other waits.
    """
    arguments = [*TINY, "--text_files", texts / "*.txt", "--output_dir", tmp_path / "run", "--data_dir"]
    if nodes == 1:
        done = [launch("multi_cpu", *arguments, tmp_path / "data")]
    else:
        place = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29611")
        started = [
            subprocess.Popen(
                # Each node has shards of its own, as machines do that share only the disk of the runs.
                command("multi_cpu", *arguments, tmp_path / name, launcher=(*place, "--machine_rank", str(rank))),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, name in enumerate(("data", "other"))
        ]
        done = [
            subprocess.CompletedProcess(process.args, process.returncode, *output)
            for process, output in [(process, process.communicate(timeout=300)) for process in started]
        ]
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    assert "2 rank(s)" in done[0].stdout
    run = tmp_path / "run"
    assert logged(run, "loss") == pytest.approx(logged(one_rank, "loss"), rel=rounding(8))
    assert logged(run, "eval_loss") == pytest.approx(logged(one_rank, "eval_loss"), rel=rounding(8))
    files = sorted(path.name for path in (texts / "data").glob("*.bin"))
    assert [(tmp_path / "data" / name).read_bytes() for name in files] == [
        (texts / "data" / name).read_bytes() for name in files
    ]


def test_killed_and_resumed_ends_with_the_same_bits(texts, tmp_path):
    """SIGTERM to the launcher: its ranks agree on a step, save and stop; resumed, they end as the whole run did."""
    arguments = [*TINY, "--text_files", texts / "*.txt", "--data_dir", tmp_path / "data", "--max_steps", "100"]
    arguments += ["--eval_strategy", "no", "--save_steps", "1000", "--use_cpu", "true", "--output_dir"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    on_ranks(2, run_recipe, "pretrain", *arguments, whole)
    process = subprocess.Popen(
        command("multi_cpu", *arguments, stopped), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (
        (stopped / "log.jsonl").exists() and max(logged(stopped, "loss"), default=0)
    ):
        time.sleep(0.05)
    process.terminate()
    assert "stopped (SIGTERM) at step" in process.communicate(timeout=120)[0]
    step = int(next(stopped.glob("checkpoint-*")).name.split("-")[1])
    assert 0 < step < 100
    on_ranks(2, run_recipe, "pretrain", *arguments, stopped, "--resume_from_checkpoint", "latest")
    assert list(logged(stopped, "loss")) == list(range(1, 101))
    expected, found = load_file(whole / "model.safetensors"), load_file(stopped / "model.safetensors")
    assert all((expected[name] == found[name]).all() for name in expected)


def test_a_budget_that_is_killed_goes_on_as_the_run_of_its_steps(texts, tmp_path):
    """SIGKILL. The number of steps is the checkpoint's, and the weights are those of a run that was given it."""
    arguments = [*TINY, "--text_files", texts / "*.txt", "--data_dir", tmp_path / "data", "--eval_steps", "0.5"]
    arguments += ["--save_steps", "0.2", "--logging_steps", "100", "--use_cpu", "true"]
    del arguments[arguments.index("--max_steps") : arguments.index("--max_steps") + 2]
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    for minutes in (0.05, 0.5):  # three seconds do not hold the rehearsal of a machine with much else to do
        budget = [*arguments, "--train_minutes", minutes, "--output_dir", killed]
        (process,) = start(1, run_recipe, "pretrain", *budget).processes
        while process.is_alive() and not list(killed.glob("checkpoint-*")):
            time.sleep(0.02)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
    assert process.exitcode == -signal.SIGKILL
    on_ranks(1, run_recipe, "pretrain", *budget, "--resume_from_checkpoint", "latest")
    runs = [json.loads(line)["run"] for line in (killed / "log.jsonl").read_text().splitlines() if '"run"' in line]
    steps = runs[-1]["arguments"]["max_steps"]
    on_ranks(1, run_recipe, "pretrain", *arguments, "--max_steps", steps, "--output_dir", plain)
    expected, found = load_file(plain / "model.safetensors"), load_file(killed / "model.safetensors")
    assert all((expected[name] == found[name]).all() for name in expected)


def test_wandb_works_where_nobody_is_logged_in(texts, tmp_path):
    arguments = [
        *TINY,
        "--text_files",
        texts / "*.txt",
        "--data_dir",
        texts / "data",
        "--output_dir",
        tmp_path / "run",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, ROOT / "recipes/pretrain.py", *map(str, arguments), "--report_to", "wandb"],
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("**/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text_files", "{tmp}/none/*.txt"], "none/*.txt"),
        (["--text_files", "{tmp}/binary.txt"], "binary.txt"),
        (["--text_files", "{tmp}/short.txt", "--validation_split", "tail"], "block_size"),
        (["--text_files", "{tmp}/short.txt", "--n_head", "5"], "n_embd=32 is not divisible by n_head=5"),
        (["--text_files", "{tmp}/short.txt", "--total_batch_tokens", "500"], "total_batch_tokens=500"),
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message, monkeypatch, capsys):
    """No traceback, status 2, and no run folder."""
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02" * 100)
    (tmp_path / "short.txt").write_text("too short")
    arguments = [text.format(tmp=tmp_path) for text in arguments]
    monkeypatch.chdir(tmp_path)
    given = [*TINY, *arguments, "--output_dir", tmp_path / "run"]
    assert message in refusal("pretrain", given, capsys)
    assert not (tmp_path / "run").exists()
