"""What is watched beside the loss: right figures, and the same names in every service."""

import json
import math

import pytest
import torch
import wandb
from safetensors.torch import load_file

from llmkit.errors import UserError
from llmkit.evaluation.hellaswag import encode_hellaswag, load_hellaswag, score_hellaswag
from llmkit.runs.run import load_run
from small_run import BLOCK, losses, trainer, weights

KINDS = ("token_embedding", "position_embedding", "attention", "mlp", "layernorm")


def test_norms_are_those_of_the_step(data, tmp_path):
    """Against the parameters before and after one step, and gradients from the model itself."""
    how = {"monitor_steps": 2, "logging_steps": 2, "max_steps": 2, "max_grad_norm": 0.1, "save_strategy": "steps"}
    run = trainer(data, tmp_path, **how, save_steps=1)
    run.train()
    before = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    after = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    run.model.load_state_dict(before, strict=False)
    run.model.zero_grad()
    batch = list(run.get_train_dataloader())[1]
    run.model.train()(**batch).loss.backward()
    (entry,) = [entry for entry in run.state.log_history if "loss" in entry]

    parts = dict(zip(KINDS, (("wte",), ("wpe",), (".attn.",), (".mlp.",), ("ln_",)), strict=True))
    names, squares = [], 0.0
    for kind, texts in parts.items():
        mine = [name for name in after if any(text in name for text in texts)]
        names += mine
        old = math.sqrt(sum(before[name].square().sum().item() for name in mine))
        change = math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in mine))
        gradient = math.sqrt(sum(run.model.get_parameter(name).grad.square().sum().item() for name in mine))
        assert entry[f"param_norm/{kind}"] == pytest.approx(old, rel=1e-5)
        assert entry[f"update_ratio/{kind}"] == pytest.approx(change / old, rel=1e-4)
        assert entry[f"grad_norm/{kind}"] == pytest.approx(gradient, rel=1e-4)
        squares += entry[f"grad_norm/{kind}"] ** 2
    assert sorted(names) == sorted(after)
    assert math.sqrt(squares) == pytest.approx(entry["grad_norm"]) and entry["grad_norm"] > 0.1, "it was not clipped"


def test_watching_changes_nothing(data, tmp_path, hellaswag):
    plain = trainer(data, tmp_path / "a")
    plain.train()
    watched = trainer(
        data, tmp_path / "b", monitor_steps=2, hellaswag_steps=3, hellaswag_file=hellaswag, hellaswag_questions=5
    )
    watched.train()
    assert losses(watched) == losses(plain)
    assert all(torch.equal(weight, weights(watched)[name]) for name, weight in weights(plain).items())

    log = load_run(tmp_path / "b")
    assert [record["step"] for record in log.training if "update_ratio/mlp" in record] == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "hellaswag/acc_norm" in line]
    assert [line["step"] for line in scored] == [3, 6]
    rows = load_hellaswag(hellaswag)[:5]
    questions = encode_hellaswag(rows, watched.processing_class, BLOCK)
    expected = score_hellaswag(watched.model, questions, batch_size=5)
    assert {name: scored[1][name] for name in expected} == expected and expected["hellaswag/questions"] == 5


def test_every_service_has_the_same_names(data, tmp_path, hellaswag, monkeypatch):
    """TensorBoard's event files read back, and wandb's offline run: log.jsonl's names after `train/` and `eval/`."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    watching = {"monitor_steps": 2, "hellaswag_steps": 2, "hellaswag_file": hellaswag, "optim": "muon"}
    run = trainer(
        data, tmp_path / "run", **watching, eval_strategy="steps", eval_steps=2, report_to=["tensorboard", "wandb"]
    )
    run.train()

    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    expected = set()
    for record in log:
        if "run" not in record and "train_runtime" not in record:
            names = record.keys() - {"step", "time"}
            expected |= {f"eval/{n.removeprefix('eval_')}" if n.startswith("eval_") else f"train/{n}" for n in names}
    assert {f"train/{name}/{kind}" for name in ("param_norm", "update_ratio") for kind in KINDS} < expected
    assert {"train/hellaswag/acc_norm", "train/lr/muon", "train/tokens", "eval/bits_per_byte"} < expected

    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert expected <= set(board.Tags()["scalars"])
    figures = {event.step: event.value for event in board.Scalars("train/update_ratio/mlp")}
    assert figures == pytest.approx({r["step"]: r["update_ratio/mlp"] for r in log if "update_ratio/mlp" in r})

    assert expected <= set(wandb.run.summary.keys())
    assert wandb.run.summary["train/update_ratio/mlp"] == board.Scalars("train/update_ratio/mlp")[-1].value
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_what_is_refused(data, tmp_path, hellaswag, monkeypatch):
    for given, message in [
        ({"monitor_steps": 3, "logging_steps": 2}, "monitor_steps=3: give a multiple of logging_steps=2"),
        ({"hellaswag_steps": -1}, "hellaswag_steps=-1: give a multiple"),
        ({"hellaswag_file": hellaswag}, "are for hellaswag_steps: give that as well"),
        ({"hellaswag_steps": 1, "hellaswag_file": hellaswag, "hellaswag_questions": 0}, "hellaswag_questions=0: must"),
        (
            {"hellaswag_steps": 1, "hellaswag_file": str(tmp_path / "none.jsonl")},
            "hellaswag_file=.*none.jsonl: no such file",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            trainer(data, tmp_path, **given)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="monitor_steps needs whole parameters, and FSDP shards them"):
        trainer(data, tmp_path, monitor_steps=2)
