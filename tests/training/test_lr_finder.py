"""`llmkit lr-find`: it suggests what its rule says, and leaves the run that it is for alone."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from transformers import PhiConfig, PhiForCausalLM, set_seed

from llmkit.cli import main as llmkit
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.errors import UserError
from llmkit.training.lr_finder import Step, has_diverged, smooth, suggest
from ranks import on_ranks, printed
from small_run import losses, run_recipe, trainer, write_sums

TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--vocab_size", "300"]
TINY += ["--total_batch_tokens", "256", "--per_device_train_batch_size", "4", "--bf16", "false"]
FIND = ["--num_steps", "24", "--min_lr", "1e-4"]
SFT = ["--max_length", "64", "--lora_r", "4", "--bf16", "false", "--per_device_train_batch_size", "2"]
SFT += ["--gradient_accumulation_steps", "1", "--validation_fraction", "0.2", "--sample_prompts", "Who?"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A pretraining recipe with its text, and a fine-tuning one with its base and its conversations."""
    work = tmp_path_factory.mktemp("work")
    write_sums(work / "texts", files=40)
    settings = {"data_dir": work / "data", "output_dir": work / "run", "text_files": f"[{work}/texts/*.txt]"}
    settings |= {"learning_rate": 1e-3, "use_cpu": "true", "max_steps": 4, "logging_steps": 1, "save_steps": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": "[1 times]"}
    settings |= dict(zip((flag[2:] for flag in TINY[::2]), TINY[1::2], strict=True))
    (work / "pretrain_sums.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))

    sums = [(work / "texts" / f"{number}.txt").read_text() for number in (0, 1)]
    tokenizer = train_bpe_tokenizer(["### Human: {}\n### Assistant: {}".format(*sums)], 300)
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PhiConfig(vocab_size=320, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, **sizes)
    PhiForCausalLM(config).save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    rows = [{"text": f"### Human: {n} times 2?### Assistant: {2 * n}, that is."} for n in range(40)]
    (work / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def train(work: Path) -> list[float]:
    """The losses of the recipe's run, in this process; a run that is there is replaced."""
    shutil.rmtree(work / "run", ignore_errors=True)
    run_recipe("pretrain", "--config", work / "pretrain_sums.yaml")
    log = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in log if "loss" in record]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def read(folder: Path) -> list[dict[str, float]]:
    with (folder / "lr_find.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def found(work) -> Path:
    """What one rank finds, beside the folder of a run whose bytes and times are the same after it."""
    first = train(work)
    before = contents(work / "run")
    llmkit(["lr-find", "--config", str(work / "pretrain_sums.yaml"), *FIND, "--output", str(work / "one")])
    assert contents(work / "run") == before
    assert train(work) == first, "the run after it is not the run before it"
    assert read(work / "one")[0]["loss"] == pytest.approx(first[0], rel=1e-5), "it began with other weights or batches"
    return work / "one"


def test_files(found):
    rows = read(found)
    assert list(rows[0]) == ["step", "learning_rate", "loss", "smoothed"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    ratios = [later["learning_rate"] / row["learning_rate"] for row, later in zip(rows, rows[1:], strict=False)]
    assert rows[0]["learning_rate"] == 1e-4 and ratios == pytest.approx([1e4 ** (1 / 23)] * len(ratios), rel=1e-4)
    assert min(row["smoothed"] for row in rows) < rows[0]["loss"] - 0.5, "nothing was learned"
    with Image.open(found / "lr_find.png") as image:
        assert image.size > (600, 400) and len(image.convert("RGB").getcolors(maxcolors=2**20)) > 10


def test_two_ranks_find_what_one_does(found, work):
    command = ["lr-find", "--config", str(work / "pretrain_sums.yaml"), *FIND, "--output", str(work / "two")]
    said = on_ranks(2, printed, llmkit, command)
    assert [text.count("learning_rate: ") for text in said] == [1, 0]
    one, two = read(found), read(work / "two")
    assert [row["learning_rate"] for row in two] == [row["learning_rate"] for row in one]
    # Sums in another order: equal to rounding, which a high learning rate blows up.
    assert [row["loss"] for row in two[:15]] == pytest.approx([row["loss"] for row in one[:15]], rel=1e-5)


def test_fine_tuning(work, capsys):
    (work / "sft_sums.yaml").write_text(f"model: {work}/base\ndata_files: [{work}/chats.jsonl]\n")
    arguments = ["--config", str(work / "sft_sums.yaml"), *SFT, "--output", str(work / "sft"), "--output_dir"]
    llmkit(["lr-find", *arguments, str(work / "untouched"), "--num_steps", "20", "--min_lr", "1e-3"])
    line = capsys.readouterr().out.splitlines()[-1]
    name, value = line.split(": ")
    assert name == "learning_rate" and 1e-3 < float(value) < 1
    rows = read(work / "sft")
    assert min(row["smoothed"] for row in rows) < rows[0]["loss"]
    assert not (work / "untouched").exists()


def test_groups_of_the_optimizer_keep_their_ratio(data, tmp_path):
    given = {"optim": "muon", "learning_rate": 1e-3, "muon_learning_rate": 5e-3}
    run = trainer(data, tmp_path, **given, lr_schedule="range_test", range_test_min_lr=1e-4, range_test_max_lr=1e-2)
    run.create_optimizer()
    adamw, _, muon = run.create_scheduler(6).get_last_lr()
    assert (adamw, muon) == pytest.approx((1e-4, 5e-4))


def test_the_rate_of_each_group_is_suggested(work, tmp_path, capsys):
    arguments = ["--optim", "muon", "--learning_rate", "1e-3", "--muon_learning_rate", "5e-3"]
    llmkit(["lr-find", "--config", str(work / "pretrain_sums.yaml"), *FIND, "--output", str(tmp_path), *arguments])
    rates = dict(re.findall(r"^(\w*learning_rate): (\S+)$", capsys.readouterr().out, flags=re.M))
    assert float(rates["muon_learning_rate"]) == pytest.approx(5 * float(rates["learning_rate"]), rel=0.06)


def curve(*losses: float) -> list[Step]:
    return [Step(i + 1, 1e-5 * 2**i, loss) for i, loss in enumerate(losses)]


def test_the_rule():
    """Nineteen twentieths of the fall from 8 to 4 is at 4.2; what comes after the lowest does not matter."""
    steps = curve(8, 8, 8, 7, 6, 5, 4.5, 4.25, 4.15, 4.1, 4, 4, 4, 9, math.nan)
    assert smooth([step.loss for step in steps[6:10]], half_width=1)[1:3] == pytest.approx([4.3, 4.166667])
    assert suggest(steps, half_width=1) == steps[8].learning_rate
    assert smooth([1, 2, 6, 4, 5], half_width=1) == [1, 3, 4, 5, 5]
    for flat in (curve(*[5.0] * 9), curve(5, 5, 6, 7, 8)):
        with pytest.raises(UserError, match="began at 5.000 and never fell between 1.0e-05 and .*lower --min_lr"):
            suggest(flat, half_width=1)
    with pytest.raises(UserError, match="the loss is nan at the first step"):
        suggest(curve(math.nan), half_width=1)


def test_it_stops_when_the_loss_diverges():
    falling = [8, 8, 7, 6, 5, 4]
    assert not any(has_diverged(falling[:n], 2) for n in range(1, 7))
    assert not has_diverged([*falling, 7], 2), "one bad step is not the end"
    assert has_diverged([*falling, 7, 7], 2)
    assert has_diverged([*falling, math.nan], 2) and has_diverged([*falling, math.inf], 2)


def test_a_diverging_run_stops(data, tmp_path):
    given = {"lr_schedule": "range_test", "range_test_min_lr": 1e-2, "range_test_max_lr": 1e6, "max_grad_norm": 0.0}
    run = trainer(data, tmp_path, **given, max_steps=30)
    run.train()
    found = losses(run)
    assert 2 < len(found) < 30 and not found[-1] < min(found) + 1  # nan perhaps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_steps", "19"], "num_steps=19: a curve takes 20 or more"),
        (["--min_lr", "1", "--max_lr", "0.1"], "min_lr=1 and max_lr=0.1: give two above 0, min_lr the lower one"),
        (["--block_size", "100000"], "the train split has .* tokens, one window of block_size 100,000 takes"),
        (["--learning_rate", "0"], "learning_rate=0: .* give it one above 0"),
        (["--n_layers", "3"], "unknown argument --n_layers: did you mean --n_layer"),
        (["--train_minutes", "3"], "train_minutes=3 and max_steps=100: give one of them"),
    ],
)
def test_mistakes_are_told_in_a_line(work, tmp_path, capsys, arguments, message):
    fields = ["--total_batch_tokens", "800000"] if "--block_size" in arguments else []
    command = ["lr-find", "--config", str(work / "pretrain_sums.yaml"), "--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit):
        llmkit([*command, *arguments, *fields])
    lines = [line for line in capsys.readouterr().err.split("\n") if "tokenizing" not in line]  # its progress bar
    [error] = filter(None, lines)
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()


def test_a_recipe_without_a_script_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("max_steps: 3\n")
    with pytest.raises(SystemExit):
        llmkit(["lr-find", "--config", "mine.yaml"])
    assert "begin it with pretrain_ or sft_" in capsys.readouterr().err
