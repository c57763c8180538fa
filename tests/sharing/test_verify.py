"""`llmkit verify`: what was tampered with is seen, by the training's record or by a consumer."""

import json
import math
import shutil
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import set_seed

from llmkit import GPT2Config, GPT2LMHeadModel, cli
from llmkit.data.tokenizer import load_tokenizer
from llmkit.errors import UserError
from llmkit.files import COMPLETE
from llmkit.finetuning.adapters import AdapterArguments, load_base_model
from llmkit.finetuning.conversations import add_chat_template
from llmkit.runs.run import LOG, QUANTIZATION_CONFIG
from llmkit.sharing import consumers
from llmkit.sharing.questions import AGREES, DIFFERS, INSTALL, NOT_INSTALLED, ask_ours, compare
from llmkit.sharing.verify import Settings, load_ours, verify
from small_run import trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run: its folder as a recipe leaves it, with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    often = {"save_strategy": "steps", "save_steps": 30, "eval_strategy": "steps", "eval_steps": 30}
    trained = trainer(data, folder, max_steps=60, logging_steps=30, **often)
    trained.train()
    trained.save_model()
    trained.evaluate()
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return str(folder / "bin" / "python")


def quietly(line: str) -> None:
    pass


def wrong(folder: Path, settings: Settings) -> set[str]:
    """The names of the checks that found something else."""
    report = verify(str(folder), settings, quietly)
    found = {check.name for check in report.checks if check.same is False}
    assert report.agrees == (not found)
    return found


# ------------------------------------------------------------------ what the training recorded


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_activation(folder: Path) -> None:
    edit(folder / "config.json", activation_function="relu")


def resized_embedding(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    embedding = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = torch.cat([embedding, embedding[:7]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=len(embedding) + 7)


def embedding_of_another_size(folder: Path) -> None:
    """As above, and the configuration does not say so."""
    was = json.loads((folder / "config.json").read_text())["vocab_size"]
    resized_embedding(folder)
    edit(folder / "config.json", vocab_size=was)


def no_end_token(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=None)


def no_end_token_of_the_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)


def flipped_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"] *= -1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def altered_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


# What is seen by the run's log and its shards alone, without checksums.
BY_THE_LOG = {
    other_activation: {"configuration", "validation loss"},
    resized_embedding: {"configuration"},
    embedding_of_another_size: {"opens here"},
    no_end_token: {"configuration", "end token"},
    no_end_token_of_the_tokenizer: {"opens here"},
    flipped_weights: {"validation loss"},
    altered_tokenizer: {"tokenizer"},
    other_chat_template: set(),
}


def test_a_run_and_its_checkpoints_are_what_was_saved(run, bare):
    for folder in (run, run / "checkpoint-30", run / "checkpoint-60"):
        report = verify(str(folder), Settings(python=bare), quietly)
        assert report.agrees
        found = {check.name: check.same for check in report.checks}
        names = ("files", "configuration", "end token", "tokenizer", "validation loss")
        assert found == dict.fromkeys(names, True), report.table()


@pytest.mark.parametrize("tamper", BY_THE_LOG, ids=lambda tamper: tamper.__name__)
def test_what_was_tampered_with_is_seen(run, bare, tmp_path, tamper):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    tamper(folder)
    report = verify(str(folder), Settings(python=bare), quietly)
    table = report.table()
    assert not report.agrees and "NO" in table, table
    sealed = folder / "checkpoint-60"
    tamper(sealed)
    assert "files" in wrong(sealed, Settings(python=bare, loss=False))
    (folder / COMPLETE).unlink()
    assert BY_THE_LOG[tamper] <= wrong(folder, Settings(python=bare))
    (folder / LOG).unlink()  # nothing is left to compare with, and the report says so
    alone = verify(str(folder), Settings(python=bare), quietly)
    told = {check.name: check.same for check in alone.checks}
    assert told.get("files") is None and told.get("configuration") is None


def test_shards_that_moved_and_others(run, data, bare, tmp_path):
    manifest, _ = data
    moved, folder = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(manifest.directory, moved)
    shutil.copytree(run, folder)
    text = (folder / LOG).read_text()
    (folder / LOG).write_text(text.replace(str(manifest.directory), "gone"))
    found = {check.name: check.same for check in verify(str(folder), Settings(python=bare), quietly).checks}
    assert found["validation loss"] is None and found["tokenizer"] is None
    found = {c.name: c.same for c in verify(str(folder), Settings(python=bare, data_dir=str(moved)), quietly).checks}
    assert found["validation loss"] is True and found["tokenizer"] is True
    (folder / LOG).write_text(text.replace(manifest.fingerprint, "0" * 16))
    with pytest.raises(UserError, match="holds other data than"):
        verify(str(folder), Settings(python=bare), quietly)


# ------------------------------------------------------------------ what consumers answer


@pytest.fixture(scope="module")
def chatty(run, tmp_path_factory) -> Path:
    """A model whose logits are far enough apart for a greedy text, with room for a conversation, and its template."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = load_tokenizer(str(run))
    add_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 192, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**sizes).for_tokenizer(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(chatty):
    """Our answers for it."""
    return ask_ours(load_ours(chatty), load_tokenizer(str(chatty)), chatty)


def answers_of(ours) -> dict:
    """A consumer's that agrees."""
    end = ours.questions["end_token"]
    greedy = [[*ids, end] for ids in ours.greedy]
    return {
        "version": "consumer 1",
        "greedy": greedy,
        "stopped": True,
        "tokens": ours.tokens,
        "chat": ours.chat,
        "ends": [end],
    }


def test_a_consumer_that_says_the_same_agrees(ours):
    row = compare("transformers", answers_of(ours), ours.logits, ours)
    assert (row.state, row.logits, row.note) == (AGREES, 0, "")
    assert row.same_text and row.stops and row.same_tokens and row.same_chat
    silent = answers_of(ours) | {"stopped": None, "tokens": None, "chat": None, "ends": None}
    assert compare("ctranslate2", silent, ours.logits, ours).state == AGREES


DIFFERENT = {
    "greedy": (lambda greedy: [[(ids[0] + 1) % 250, *ids[1:]] for ids in greedy], "greedy text"),
    "stopped": (lambda _: False, "does not stop"),
    "tokens": (lambda tokens: [tokens[0][::-1], *tokens[1:]], "tokens are others"),
    "chat": (lambda chat: chat + " ", "chat template is another"),
    "ends": (lambda ends: [None], "for the end token"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_consumer_that_answers_otherwise_differs(ours, what):
    change, note = DIFFERENT[what]
    answers = answers_of(ours)
    row = compare("transformers", answers | {what: change(answers[what])}, ours.logits, ours)
    assert row.state == DIFFERS and note in row.note


def test_logits_are_bounded_by_rounding(ours):
    bound = ours.bounds["float32"]

    def state(change, consumer="transformers") -> str:
        logits = [each.copy() for each in ours.logits]
        change(logits)
        return compare(consumer, answers_of(ours), logits, ours).state

    def add(amount):
        return lambda logits: logits[1].__setitem__((5, 7), logits[1][5, 7] + amount)

    assert state(add(0.9 * bound)) == AGREES and state(add(1.1 * bound)) == DIFFERS
    assert state(add(1.1 * bound), "llama.cpp") == AGREES  # whose activations are float16
    assert state(add(math.nan)) == DIFFERS
    assert state(lambda logits: logits.__setitem__(0, logits[0][:, :-1])) == DIFFERS
    # vLLM says some of them, and has to say one at least.
    assert state(lambda logits: logits[1].__setitem__(slice(0, 60), math.nan), "vllm") == AGREES
    assert state(lambda logits: logits[1].fill(math.nan), "vllm") == DIFFERS
    assert 0 < bound < 1e-3 * np.abs(ours.logits[0]).max()


def test_texts_may_part_where_two_tokens_are_equally_likely(ours):
    answers, path = answers_of(ours), ours.paths[0].copy()
    first = ours.greedy[0][0]
    other = (first + 1) % path.shape[1]
    answers["greedy"] = [[other, 0, 0, 0], *answers["greedy"][1:]]
    assert compare("transformers", answers, ours.logits, ours).same_text is False
    path[0, other] = path[0, first] - ours.bounds["float32"]
    tied = replace(ours, paths=[path, *ours.paths[1:]])
    assert compare("transformers", answers, ours.logits, tied).same_text


def test_llmkit_cannot_be_imported_beside_a_consumer():
    with pytest.raises(ModuleNotFoundError):
        consumers.WithoutLlmkit.find_spec("llmkit.model")
    assert consumers.WithoutLlmkit.find_spec("transformers") is None
    assert set(consumers.CONSUMERS) == set(INSTALL)


# ------------------------------------------------------------------ the command


def test_what_is_not_installed_is_told_and_counts_where_it_was_asked_for(run, bare, capsys):
    cli.main(["verify", str(run), "--python", bare, "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = {row["consumer"]: row for row in report["consumers"]}
    assert rows.keys() == set(INSTALL) - {"peft"} and report["agrees"]
    assert {row["state"] for row in rows.values()} == {NOT_INSTALLED}
    assert all(f"{bare} lacks" in row["note"] and "pip install" in row["note"] for row in rows.values())
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(run), "--python", bare, "--only", "vllm"])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "vllm" in said and "transformers" not in said


def test_a_process_that_dies_is_told(run, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    python.chmod(0o755)
    report = verify(str(run), Settings(python=str(python), only=["transformers"], loss=False), quietly)
    assert not report.agrees and "its process ended with 3: out of luck" in report.table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "/nowhere/python"], "there is no such program"),
        (["--llama_cpp", "."], "no convert_hf_to_gguf.py there"),
        (["--keep", "."], "is there already"),
        (["--only", "excel"], "invalid choice"),
    ],
)
def test_mistakes_are_told_in_one_line(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(run), *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.slow
def test_stock_transformers_without_llmkit(run, tmp_path, capsys):
    """It agrees with us; a checkpoint without its record and without an end token is found out by the consumer."""
    cli.main(["verify", str(run), "--only", "transformers"])
    said = capsys.readouterr().out
    assert "transformers" in said and "NO" not in said
    folder = tmp_path / "alone"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(LOG, COMPLETE, "checkpoint-*"))
    no_end_token(folder)
    report = verify(str(folder), Settings(only=["transformers"]), quietly)
    (row,) = report.rows
    assert row.state == DIFFERS and row.stops is False and row.logits <= row.bound


@pytest.mark.slow
def test_an_adapter_on_its_base_and_merged(chatty, tmp_path):
    base = AdapterArguments(model=str(chatty))
    model = load_base_model(base, torch.float32, CPU)
    model = get_peft_model(model, base.lora_config(model))
    tokenizer, folder = load_tokenizer(str(chatty)), tmp_path / "adapter"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.config.quantization_config.to_json_file(folder / QUANTIZATION_CONFIG)
    settings = Settings(only=["peft", "transformers"], keep=tmp_path / "kept")
    report = verify(str(folder), settings, quietly)
    assert report.agrees and "files of base" in report.table(), report.table()
    assert [row.consumer for row in report.rows] == ["peft", "transformers"]
    assert all(row.same_chat for row in report.rows) and (tmp_path / "kept" / "merged" / COMPLETE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("consumer", "module"), [("ctranslate2", "ctranslate2"), ("onnxruntime", "optimum.onnxruntime")]
)
def test_a_consumer_that_is_installed_here(run, consumer, module):
    pytest.importorskip(module, reason=f"{consumer} is not installed: {INSTALL[consumer]}")
    report = verify(str(run), Settings(only=[consumer], python=sys.executable), quietly)
    assert report.agrees, report.table()
