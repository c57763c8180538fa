"""A run is read back from its log as it was: what it logged, how far it came, and how long it took."""

import json
import math
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.runs.run import load_run

RECORD = {
    "arguments": {"output_dir": "/home/alice/runs/it", "max_steps": 20, "learning_rate": 0.01},
    "defaults": {},
    "source": {"n_layer": 2},
    "decisive": {"learning_rate": 0.01, "seed": 42},
    "model": {
        "parameters": 12345,
        "attention": "sdpa",
        "config": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16},
    },
    "data": {
        "description": "*.txt (3 files)",
        "directory": "/home/alice/data",
        "fingerprint": "abc",
        "block_size": 16,
        "train_tokens": 5000,
        "train_documents": 3,
        "train_bytes": 15000,
        "validation_tokens": 500,
        "tokens_per_byte": 0.25,
    },
    "machine": {"device": "cpu (x86_64)", "ranks": 1, "cpus": 2},
    "versions": {"llmkit": "0.1.0"},
}


def start(step: int, time: float, **arguments) -> dict:
    return {"step": step, "time": time, "run": {**RECORD, "arguments": RECORD["arguments"] | arguments}}


def loss(step: int, time: float, value: float = 3.0, **more) -> dict:
    return {"step": step, "time": time, "loss": value, "tokens": 100 * step, "epoch": step / 50, **more}


def end(step: int, time: float) -> dict:
    return {"step": step, "time": time, "train_runtime": 1.0, "epoch": step / 50}


def write_log(folder: Path, records: list[dict], cut: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + cut)
    return folder


def test_a_finished_run(tmp_path):
    records = [start(0, 10.0), loss(10, 15.0), {"step": 10, "time": 17.0, "eval_loss": 2.0}, loss(20, 22.0)]
    records += [{"step": 20, "time": 23.0, "prompt": "a", "sample": "ab"}, end(20, 24.5)]
    run = load_run(write_log(tmp_path, records))
    assert run.log == records
    assert (run.training, run.evaluations, run.samples) == ([records[1], records[3]], [records[2]], [records[4]])
    assert (run.status, run.progress, run.end) == ("finished", 1.0, records[-1])
    assert run.seconds() == [0, 5, 7, 12, 13, 14.5]


def test_the_hours_between_a_kill_and_the_resume_do_not_count(tmp_path):
    records = [start(0, 100.0), loss(5, 105.0), end(5, 106.0)]  # stopped by a signal
    records += [start(5, 40_000.0), loss(10, 40_004.0)]  # killed, and resumed twice
    records += [start(10, 90_000.0), loss(20, 90_007.0), end(20, 90_008.0)]
    run = load_run(write_log(tmp_path, records))
    assert run.seconds() == [0, 5, 6, 6, 10, 10, 17, 18]
    assert [record["step"] for record in run.starts] == [0, 5, 10]
    assert run.status == "finished"


@pytest.mark.parametrize(
    ("records", "status", "progress"),
    [
        ([start(0, 0.0)], "unfinished", 0.0),
        ([start(0, 0.0), loss(5, 1.0)], "unfinished", 0.25),
        ([start(0, 0.0), loss(5, 1.0), end(5, 2.0)], "stopped", 0.25),
        # The stop of an earlier start is not the end of this one.
        ([start(0, 0.0), loss(5, 1.0), end(5, 2.0), start(5, 9.0), loss(8, 11.0)], "unfinished", 0.4),
        ([start(0, 0.0), loss(5, 1.0, math.nan)], "diverged", 0.25),
        # Planned in epochs: 3, Trainer's default, or what was asked for.
        ([start(0, 0.0, max_steps=-1), loss(75, 1.0), end(75, 2.0)], "stopped", 0.5),
        ([start(0, 0.0, max_steps=-1, num_train_epochs=1.5), loss(75, 1.0), end(75, 2.0)], "finished", 1.0),
        ([start(0, 0.0, max_steps=-1)], "unfinished", None),
    ],
)
def test_how_a_run_stands(records, status, progress, tmp_path):
    run = load_run(write_log(tmp_path, records))
    assert (run.status, run.progress) == (status, progress)


def test_the_run_of_a_checkpoint_and_a_line_that_a_kill_cut_short(tmp_path):
    write_log(tmp_path, [start(0, 0.0), loss(5, 1.0)], cut='{"step": 6, "time": 2.0, "lo')
    (tmp_path / "checkpoint-5").mkdir()
    run = load_run(tmp_path / "checkpoint-5")
    assert run.folder == tmp_path
    assert len(run.log) == 2


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "time": 1.0, "loss": 2.0}\n', "no json\n"])
def test_what_is_not_a_run_is_one_line(text, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_run(tmp_path / "missing")


DAMAGED = [
    "42",
    "null",
    "[]",
    '"text"',
    "{}",
    '{"loss": 2.0}',
    '{"step": 3, "loss": 2.0}',
    '{"step": "3", "time": 1.0, "loss": 2.0}',
    '{"step": null, "time": 1.0, "loss": 2.0}',
    '{"step": -1, "time": 1.0, "loss": 2.0}',
    '{"step": 1e400, "time": 1.0, "loss": 2.0}',
    '{"step": 3, "time": "noon", "loss": 2.0}',
    '{"step": 3, "time": NaN, "loss": 2.0}',
    '{"step": 3, "time": 1e300, "loss": 2.0}',
    '{"step": 3, "time": 2.0, "loss": 1' + "0" * 5000 + "}",
    "[" * 100_000,
    b"\xff\xfe\x00 \xe2",
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_line_that_is_no_record_is_left_out(line, tmp_path):
    whole = [start(0, 0.0), loss(5, 1.0)]
    write_log(tmp_path, whole)
    line = line if isinstance(line, bytes) else line.encode()
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(line + b"\n" + log + line + b"\n")
    run = load_run(tmp_path)
    assert [record["step"] for record in run.log] == [0, 5]
    assert [record["loss"] for record in run.training] == [3.0]


def test_what_a_line_has_of_another_type_is_left_out(tmp_path):
    odd = {"step": 6, "time": 2.0, "loss": "2.5", "eval_loss": None, "epoch": [1], "grad_norm": 10**400, "mfu": 0.5}
    odd |= {"prompt": 3, "sample": {}, "tokens": True}
    run = load_run(write_log(tmp_path, [start(0, 0.0), loss(5, 1.0), odd]))
    assert run.log[-1] == {"step": 6, "time": 2.0, "mfu": 0.5}
    assert (len(run.training), run.evaluations, run.samples, run.progress) == (1, [], [], 0.3)


@pytest.mark.parametrize("record", [{}, dict.fromkeys(RECORD), {"model": {"config": []}, "data": {"fingerprint": 3}}])
def test_a_record_that_lacks_parts_has_them_empty(record, tmp_path):
    run = load_run(write_log(tmp_path, [{"step": 0, "time": 0.0, "run": record}, loss(5, 1.0)]))
    assert run.record["model"]["config"] == {} and run.record["arguments"] == {}
    assert isinstance(run.record["data"]["fingerprint"], str)
    assert (run.kind, run.progress) == ("pretraining", 5 / 50 / 3)


@pytest.mark.parametrize(
    ("record", "kind", "counted"),
    [
        ({"kind": "pretraining"}, "pretraining", "tokens"),
        ({"kind": "fine-tuning"}, "fine-tuning", "answer tokens"),
        # What an older log has.
        ({"data": {"conversations": 3}}, "fine-tuning", "answer tokens"),
        ({}, "pretraining", "tokens"),
    ],
)
def test_the_kind_of_a_run(record, kind, counted, tmp_path):
    run = load_run(write_log(tmp_path, [{"step": 0, "time": 0.0, "run": record}]))
    assert (run.kind, run.counted) == (kind, counted)
