"""`llmkit eval`: on the data of a run, on any text, on two ranks; and lm-evaluation-harness on the same checkpoint."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkit import cli
from llmkit.data.corpus import open_corpus
from llmkit.evaluation.held_out import TextWindows, evaluate_windows
from llmkit.runs.run import load_run
from small_run import accelerate_launch, run_recipe

ROOT = Path(__file__).parents[2]
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 300, "total_batch_tokens": 256}
SIZES |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3, "max_steps": 4, "eval_steps": 2}
SIZES |= {"save_steps": 2, "learning_rate": 0.01, "bf16": "false", "tokenizer": "bpe", "validation_fraction": 0.1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}; é.\n" for n in range(20)))
    return folder


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory) -> Path:
    """A run of the recipe."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    paths = {"text_files": texts / "*.txt", "data_dir": texts / "data", "output_dir": folder}
    arguments = [word for name, value in (SIZES | paths).items() for word in (f"--{name}", str(value))]
    run_recipe("pretrain", *arguments)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """A file in HellaSwag's format about the run's own texts; some contexts are longer than its model's."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("hellaswag") / "questions.jsonl"
    with path.open("w") as file:
        for index in range(30):
            n, answers = rng.randrange(40), [f"{rng.randrange(800)}." for _ in range(4)]
            context = "; ".join(["3 times 2 is 6"] * rng.randrange(9) + [f"{n} times 7 is"])
            file.write(
                json.dumps({"ind": index, "ctx": context, "endings": answers, "label": rng.randrange(4)}) + "\n"
            )
    return path


def evaluate(capsys, *arguments: object) -> list[dict]:
    cli.main(["eval", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def failing(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", *map(str, arguments)])
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


# ------------------------------------------------------------------ on the data of a run


def test_json_has_no_nan(run, questions, tmp_path, capsys):
    """A broken model's loss, and the standard error of a single question."""
    broken = AutoModelForCausalLM.from_pretrained(run)
    with torch.no_grad():
        broken.transformer.ln_f.bias.fill_(math.nan)
    broken.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(run).save_pretrained(tmp_path)
    (tmp_path / "one.jsonl").write_text(questions.read_text().splitlines()[0])
    text = tmp_path / "text.txt"
    text.write_text("1 times 2 is 2")
    arguments = ["eval", tmp_path, "--text_files", text, "--hellaswag", tmp_path / "one.jsonl"]
    cli.main([*map(str, arguments), "--json", "--output", str(tmp_path / "answers.jsonl")])
    refuse = pytest.fail  # what JSON does not have
    (result,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert result["loss"] is None and "hellaswag/acc_stderr" not in result
    assert json.loads((tmp_path / "answers.jsonl").read_text(), parse_constant=refuse)["losses"] == [None] * 4
    cli.main([str(argument) for argument in arguments])
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_run_gets_the_loss_that_it_logged(run, capsys, batch_size):
    """Its own shards, windows and last evaluations, without being told where they are."""
    logged = {record["step"]: record for record in load_run(run).evaluations}
    checkpoints = [run, run / "checkpoint-2"]
    found = evaluate(capsys, *checkpoints, "--batch_size", batch_size, "--precision", "float32")
    for result, step in zip(found, (4, 2), strict=True):
        assert result["loss"] == pytest.approx(logged[step]["eval_loss"], rel=1e-6)
        assert result["perplexity"] == pytest.approx(logged[step]["eval_perplexity"], rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(logged[step]["eval_bits_per_byte"], rel=1e-6)
        assert result["block_size"] == 32
    assert found[0]["loss"] != found[1]["loss"]


def test_the_table_has_a_row_a_checkpoint_and_says_what_was_measured(run, questions, capsys):
    cli.main(["eval", str(run), str(run / "checkpoint-2"), "--text_files", str(questions), "--text_column", "ctx"])
    header, first, second, *_, loss, how = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "loss", "perplexity", "bits/byte"]
    assert first.split()[0] == str(run) and second.split()[0] == str(run / "checkpoint-2")
    assert "questions.jsonl" in loss and "windows of 32" in loss and how.startswith("computed with")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}"], "{tmp}: no checkpoint in this folder"),
        (["{bare}"], "no record of a pretraining run"),
        (["{run}", "--data_dir", "{tmp}"], "manifest.json is missing"),
        (["{run}", "--data_dir", "{tmp}", "--text_files", "x"], "data_dir and text_files are both set"),
        (["{run}", "--text_files", "{tmp}/none.txt"], "none.txt"),
        (["{run}", "--text_files", "{questions}", "--text_column", "ctx", "--block_size", "33"], "block_size=33"),
        (["{run}", "--hellaswag", "{tmp}/none.jsonl"], "no such file"),
        (["{run}", "--output", "{tmp}/o.jsonl"], "give --hellaswag as well"),
        (["{run}", "--hellaswag_questions", "3"], "give --hellaswag as well"),
        (["{run}", "--hellaswag", "{questions}", "--hellaswag_questions", "0"], "must be at least 1"),
        (["{run}", "--base", "{run}"], "only adapters have a base"),
        (["{run}", "--hellaswag", "{questions}", "--output", "{questions}"], "is there already"),
        (["{run}", "--hellaswag", "{questions}", "--output", "{tmp}/no/o.jsonl"], "its folder does not exist"),
        (["{run}", "--batch_size", "0"], "batch_size"),
    ],
)
def test_mistakes_are_one_line(run, questions, tmp_path, capsys, arguments, message):
    bare = tmp_path / "bare"
    AutoTokenizer.from_pretrained(run).save_pretrained(bare)
    shutil.copy(run / "config.json", bare)  # a checkpoint, and no run
    places = {"run": run, "questions": questions, "tmp": tmp_path, "bare": bare}
    error = failing(capsys, *(argument.format(**places) for argument in arguments))
    assert message.format(**places) in error


def test_shards_that_changed_since_are_refused(run, texts, capsys):
    """Another text with the same tokenizer, in the folder that the run's record names."""
    manifest = texts / "data" / "manifest.json"
    content = manifest.read_text()
    checksum = json.loads(content)["splits"]["train"]["shards"][0]["xxh3_64"]
    try:
        manifest.write_text(content.replace(checksum, "0" * len(checksum)))
        assert "holds other data now" in failing(capsys, run)
    finally:
        manifest.write_text(content)


# ------------------------------------------------------------------ on any text


def test_text_is_cut_as_shards_are(run, texts):
    """Every token but the first is a target once, documents end with end-of-text, bytes are those of the text."""
    corpus, tokenizer = open_corpus([f"{texts}/1*.txt"]), AutoTokenizer.from_pretrained(run)
    windows = TextWindows(corpus, tokenizer, block_size=50)
    documents = list(corpus.documents())
    expected = [id for document in documents for id in [*tokenizer.encode(document), tokenizer.eos_token_id]]
    batch = windows.__getitems__(list(range(len(windows))))
    kept = batch["shift_labels"].flatten() != -100
    assert batch["input_ids"].flatten()[kept].tolist() == expected[:-1]
    assert batch["shift_labels"].flatten()[kept].tolist() == expected[1:]
    assert 0 < (~kept).sum() < 50
    assert (windows.num_tokens, windows.num_bytes) == (len(expected), sum(len(text.encode()) for text in documents))


def test_loss_of_a_text_is_the_sum_over_its_windows(run, texts):
    corpus, tokenizer = open_corpus([f"{texts}/2*.txt"]), AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(run)
    ids = torch.tensor([id for text in corpus.documents() for id in [*tokenizer.encode(text), tokenizer.eos_token_id]])
    nats = 0.0
    for start in range(0, len(ids) - 1, 20):
        window = ids[start : start + 21]
        nats += F.cross_entropy(model(window[None, :-1]).logits[0].double(), window[1:], reduction="sum").item()
    metrics = evaluate_windows(model, TextWindows(corpus, tokenizer, block_size=20), 7, Accelerator(cpu=True))
    assert metrics["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    text_bytes = sum(len(text.encode()) for text in corpus.documents())
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2) * len(ids) / text_bytes)


# ------------------------------------------------------------------ on two ranks, and by others


def test_two_ranks_give_the_numbers_of_one(run, questions, tmp_path, capsys):
    data = ["--hellaswag", questions, "--data_dir", load_run(run).record["data"]["directory"], "--batch_size", 4]
    data += ["--precision", "float32", "--output"]
    one = evaluate(capsys, run, *data, tmp_path / "one.jsonl")
    launch = [*accelerate_launch("multi_cpu"), "--main_process_port", "0", "-m", "llmkit"]
    command = [*launch, "eval", run, *data, tmp_path / "two.jsonl", "--json"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (two,) = json.loads(done.stdout)  # once, though there are two ranks
    assert two.pop("loss") == pytest.approx(one[0].pop("loss"), rel=1e-12)
    assert two.pop("perplexity") == pytest.approx(one[0].pop("perplexity"), rel=1e-12)
    assert two.pop("bits_per_byte") == pytest.approx(one[0].pop("bits_per_byte"), rel=1e-12)
    assert two == one[0]
    assert two["hellaswag/questions"] == 30 and 0 < two["hellaswag/cut"] < 30
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {questions}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: endings
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
WITHOUT_LLMKIT = """
import sys
sys.modules["llmkit"] = None  # importing it raises
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
def test_the_evaluation_harness_runs_on_a_checkpoint_as_it_is(run, questions, tmp_path, capsys):
    """lm_eval, offline and without llmkit. Its acc is ours where its tokens are: given the same text, and endings
    that begin with a space. (Its acc_norm is per character.)"""
    pytest.importorskip("lm_eval")
    (tmp_path / "task.yaml").write_text(TASK.format(questions=questions))
    arguments = ["--model", "hf", "--model_args", f"pretrained={run},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", "local_hellaswag", "--include_path", tmp_path, "--output_path", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LLMKIT, "run", *map(str, arguments), "--log_samples"],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "out").glob("*/results_*.json")
    (samples,) = (tmp_path / "out").glob("*/samples_*.jsonl")
    theirs = json.loads(report.read_text())["results"]["local_hellaswag"]
    ours = evaluate(capsys, run, "--hellaswag", questions, "--precision", "float32", "--output", tmp_path / "o.jsonl")
    assert theirs["acc,none"] == ours[0]["hellaswag/acc"]
    assert theirs["acc_stderr,none"] == pytest.approx(ours[0]["hellaswag/acc_stderr"])
    losses = {item["ind"]: item["losses"] for item in map(json.loads, (tmp_path / "o.jsonl").open())}
    for sample in map(json.loads, samples.open()):
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        assert [-value for value in likelihoods] == pytest.approx(losses[sample["doc"]["ind"]], rel=1e-4)
