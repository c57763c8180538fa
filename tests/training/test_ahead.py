"""`prepare: ahead`: the same run however fast the text is tokenized, and whatever is killed meanwhile."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import psutil
import pytest
import torch

from llmkit.cli import main
from llmkit.data import ahead, holdout, prepare_ahead
from llmkit.data.ahead import AheadWindows, first_group
from llmkit.data.arguments import DataArguments
from llmkit.data.corpus import FileCorpus, open_corpus
from llmkit.data.manifest import JOURNAL, MANIFEST, load_manifest
from llmkit.data.prepare import prepare_pretraining_data, prepare_windows
from llmkit.data.shards import prepare_shards
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError, exit_on_user_error
from llmkit.training import shard_supply
from ranks import on_ranks
from small_run import BLOCK, losses, refusal, rounding, trainer, weights

HOW = {"validation_fraction": 0.1, "shard_tokens": 600, "num_workers": 1, "close_together": True}
STEPS, BATCH = 40, 16  # windows: more than one pass over the text
TOGETHER = {"max_steps": STEPS, "total_batch_tokens": BATCH * BLOCK, "per_device_train_batch_size": BATCH}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(80):
        (folder / f"{number:02d}.txt").write_text("".join(f"{number} and {n} is {number + n}\n" for n in range(8)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(data):
    return data[1]


@pytest.fixture(scope="module")
def whole(texts, tokenizer, tmp_path_factory):
    """The folder with all shards."""
    folder = tmp_path_factory.mktemp("whole")
    manifest = prepare_shards(open_corpus([str(texts)]), tokenizer, folder, **HOW)
    assert len(manifest.splits["train"].shards) >= 4 and manifest.splits["validation"].shards[1:]
    return folder


@pytest.fixture(scope="module")
def expected(whole, tokenizer, tmp_path_factory):
    """The run on shards that were all there before."""
    run = run_on(whole, tokenizer, tmp_path_factory.mktemp("expected"))
    run.train()
    return run


def run_on(folder, tokenizer, output_dir, child=None, **arguments):
    """A run on what is in the folder and will be."""
    while (first := first_of(folder, tokenizer)) is None:
        time.sleep(0.01)

    def windows(_, split, block_size):
        if split == "train":
            return AheadWindows(first, block_size, 1, expected_tokens=5000, child=child)
        return TokenWindows(first, split, block_size)

    return trainer((None, tokenizer), output_dir, windows=windows, **TOGETHER | arguments)


def first_of(folder, tokenizer):
    if (folder / MANIFEST).exists():
        return first_group(load_manifest(folder), 1)
    settings = json.loads((folder / JOURNAL).read_text())["settings"] if (folder / JOURNAL).exists() else {}
    corpus = FileCorpus.__new__(FileCorpus)
    corpus.description = "texts"
    return prepare_ahead._first_group(folder, corpus, tokenizer, settings, 1)


class Held(FileCorpus):
    """A corpus that gives no document after some, until it may."""

    def __init__(self, files, holds, gate):
        super().__init__(files, "text", "texts (80 files)")
        self.holds, self.gate, self.passes = holds, gate, 0

    def in_pieces(self, skip=0):
        self.passes += 1
        holds = self.holds if self.passes == 3 else None  # the first two look at the text beforehand
        for number, pieces in enumerate(super().in_pieces(skip), skip):
            if number == holds:
                self.gate.wait(60)
                if self.gate.broken:
                    raise UserError("the text is broken")
            yield pieces


class Gate(threading.Event):
    broken = False


@pytest.fixture
def held(texts, tokenizer, tmp_path, monkeypatch):
    """A preparation in a thread, which stops after 50 of the 80 documents until the run has said that it waits."""
    monkeypatch.setattr(ahead, "LOOK", 0.01)
    monkeypatch.setattr(holdout, "BATCH_CHARACTERS", 500)  # the text is short, and would be tokenized in one piece
    gate = Gate()
    corpus = Held(open_corpus([str(texts)]).files, 50, gate)
    said = []

    def say(line):
        said.append(line)
        gate.set()

    monkeypatch.setattr(shard_supply, "say", say)

    def work():
        try:
            prepare_shards(corpus, tokenizer, tmp_path / "shards", **HOW)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    yield tmp_path / "shards", gate, said
    gate.set()
    thread.join()


def same_weights(run, expected) -> bool:
    return all(torch.equal(value, weights(expected)[name]) for name, value in weights(run).items())


def test_a_run_that_waits_for_its_shards_is_the_run_on_whole_ones(held, tokenizer, tmp_path, expected, whole):
    folder, _, said = held
    run = run_on(folder, tokenizer, tmp_path / "run")
    assert not run.train_dataset.complete and "so far" in run.summary()
    run.train()
    assert said and "waits for its shards" in said[0]
    assert losses(run) == losses(expected) and same_weights(run, expected)
    windows = run.train_dataset
    assert windows.complete and STEPS * BATCH > len(windows) == len(TokenWindows(whole, "train", BLOCK))
    found = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert found == {path.name: path.read_bytes() for path in whole.glob("*.bin")}


def test_the_first_pass_has_each_window_once_and_in_the_order_of_the_groups(whole, expected):
    windows = expected.train_dataset
    order = windows.order(seed=0)
    first = order.windows(0, len(windows))
    assert sorted(first) == list(range(len(windows)))
    for start, stop in zip(windows.bounds, windows.bounds[1:], strict=False):
        assert sorted(first[start:stop]) == list(range(start, stop)) and first[start:stop] != sorted(first[start:stop])
    assert sorted(order.windows(len(windows), 2 * len(windows))) == sorted(first)
    plain = TokenWindows(whole, "train", BLOCK)
    every = range(len(windows))
    assert torch.equal(windows.__getitems__(every)["input_ids"], plain.__getitems__(every)["input_ids"])
    held_out = expected.eval_dataset.num_tokens
    assert held_out == load_manifest(whole).splits["validation"].shards[0].tokens


def test_a_run_that_is_killed_while_text_is_tokenized_goes_on_exactly(held, tokenizer, tmp_path, expected, texts):
    """The preparation is ended with it, and the next one goes on from its journal."""
    folder, gate, _ = held
    part = run_on(folder, tokenizer, tmp_path / "run", save_strategy="steps", save_steps=2)
    before = len(part.train_dataset)
    save = part._save_checkpoint

    class Killed(Exception):
        pass

    def die(*args):
        save(*args)
        if part.state.global_step == 4:
            gate.broken = True
            gate.set()
            raise Killed

    part._save_checkpoint = die
    with pytest.raises(Killed):
        part.train()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(10)
    assert (folder / JOURNAL).exists() and not (folder / MANIFEST).exists()
    prepare_shards(open_corpus([str(texts)]), tokenizer, folder, **HOW)
    run = run_on(folder, tokenizer, tmp_path / "run")
    assert run.record["data"]["fingerprint"] == part.record["data"]["fingerprint"]
    assert len(run.train_dataset) > before and run.eval_dataset.num_tokens == part.eval_dataset.num_tokens
    run.train(str(tmp_path / "run/checkpoint-4"))
    assert losses(run) == losses(expected) and same_weights(run, expected)


class Child:
    """As a process that failed."""

    def problem(self):
        return "texts/60.txt: not UTF-8 text"

    def stop(self):
        self.is_stopped = True


def test_a_preparation_that_fails_ends_the_run_with_a_checkpoint(held, tokenizer, tmp_path):
    child = Child()
    child.problem = lambda: None if run.state.global_step < 3 else "texts/60.txt: not UTF-8 text"
    run = run_on(held[0], tokenizer, tmp_path / "run", child=child, save_strategy="steps", save_steps=100)
    with pytest.raises(UserError, match="texts/60.txt: not UTF-8 text.* at step 3 of 40, checkpoint saved") as told:
        run.train()
    assert "\n" not in str(told.value) and child.is_stopped
    assert (tmp_path / "run/checkpoint-3/complete.json").exists()


def test_a_preparation_that_has_failed_before_the_first_step_leaves_nothing(held, tokenizer, tmp_path):
    run = run_on(held[0], tokenizer, tmp_path / "run", child=Child())
    with pytest.raises(UserError, match="^texts/60.txt: not UTF-8 text$"):
        run.train()
    assert run.train_dataset.child.is_stopped and not list((tmp_path / "run").glob("*"))


def test_blame_and_eval_find_the_windows_of_such_a_run(expected, tmp_path, capsys):
    expected.save_model()
    loss = expected.evaluate()["eval_loss"]
    capsys.readouterr()
    main(["blame", expected.args.output_dir, "--step", "1"])
    assert capsys.readouterr().out.count("window") >= BATCH
    main(["eval", expected.args.output_dir])
    assert f"{loss:.4f}" in capsys.readouterr().out


SCRIPT = """
import json, os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_ahead import train_with_child
if __name__ == "__main__":
    train_with_child(*sys.argv[2:])
"""


def train_with_child(texts, tokenizer, data_dir, output_dir, steps=STEPS, split="document", shard_tokens=600) -> None:
    """A run with everything as in a recipe, but for the size of the shards."""
    held_out = {"validation_fraction": 0.1, "validation_split": split}
    args = DataArguments([texts], tokenizer=tokenizer, data_dir=data_dir, prepare="ahead", **held_out)
    how = {"shard_tokens": int(shard_tokens), "num_workers": 1}
    ready, train, validation = prepare_ahead.prepare_ahead(args, BLOCK, **how)
    print("child", train.child and train.child.process.pid, flush=True)
    arguments = TOGETHER | {"max_steps": int(steps), "per_device_train_batch_size": BATCH // 2}
    run = trainer(
        (None, ready),
        output_dir,
        windows=lambda _, split, __: train if split == "train" else validation,
        **arguments,
    )
    exit_on_user_error(run.train)()


def places(tmp_path, texts) -> list[Path]:
    return [texts, tmp_path / "tokenizer", tmp_path / "shards", tmp_path / "run"]


def start(tmp_path, texts, tokenizer, *more):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", Path(__file__).parent, *places(tmp_path, texts), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_ranks_and_a_child_make_the_run_of_one(texts, tokenizer, tmp_path, expected):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    on_ranks(2, train_with_child, *map(str, places(tmp_path, texts)))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert found == pytest.approx(losses(expected), rel=rounding(STEPS))


@pytest.mark.slow
def test_the_child_ends_with_the_run_also_with_one_that_is_killed(tokenizer, tmp_path):
    """And not before: its text is longer than it can have read by then."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / f"texts/{number}.txt").write_text(f"{number} and then some more words of the text\n" * 40_000)
    short = start(tmp_path, tmp_path / "texts", tokenizer, "3")
    _, told = short.communicate(timeout=240)
    assert short.returncode == 0 and "leaked" not in told
    assert not (tmp_path / "shards" / MANIFEST).exists() and (tmp_path / "shards" / JOURNAL).exists()
    shutil.rmtree(tmp_path / "run")
    run = start(tmp_path, tmp_path / "texts", tokenizer, "100000")
    line = next(line for line in run.stdout if line.startswith("child"))
    child = psutil.Process(int(line.split()[1]))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    child.wait(20)
    assert not child.is_running()
    assert not (tmp_path / "shards" / MANIFEST).exists() and (tmp_path / "shards" / JOURNAL).exists()


@pytest.mark.slow
def test_text_that_cannot_be_read_is_one_line_after_a_checkpoint(texts, tokenizer, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for number in range(40):  # more than is looked at beforehand
        (broken / f"{number:02d}.txt").write_text(f"{number} and then some more words of the text\n" * 1000)
    (broken / "70.txt").write_bytes(b"fine at first\n" * 500 + b"\xff\xfe broken")
    run = start(tmp_path, broken, tokenizer, "100000", "tail", "20000")
    _, told = run.communicate(timeout=240)
    assert "70.txt: not UTF-8 text (byte offset 7000)" in told.splitlines()[-1] and "checkpoint saved" in told
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "complete.json").exists()


def test_what_cannot_be_known_ahead_is_refused_before_anything_is_written(texts, tmp_path, capsys):
    data_dir = tmp_path / "shards"
    common = ["--text_files", texts, "--data_dir", data_dir, "--output_dir", tmp_path / "run", "--prepare", "ahead"]
    for length in (["--train_minutes", "1"], ["--num_train_epochs", "2"]):
        assert "prepare: ahead needs max_steps" in refusal("pretrain", [*common, *length], capsys)
    assert not data_dir.exists() and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="prepare: ahead is for one source"):
        DataArguments(data=['{"weight": 1, "text_files": "a.txt"}'], tokenizer="gpt2", prepare="ahead")


def test_shards_that_were_made_for_another_start_are_refused(texts, tokenizer, tmp_path):
    prepare_shards(open_corpus([str(texts)]), tokenizer, tmp_path / "shards", validation_fraction=0.1)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    args = DataArguments(
        [str(texts)], tokenizer=str(tmp_path / "tokenizer"), data_dir=str(tmp_path / "shards"), prepare="ahead"
    )
    args.validation_fraction = 0.1
    with pytest.raises(UserError, match="close_together None instead of 1"):
        prepare_windows(args, BLOCK, max_steps=3)


def test_text_of_another_machine_is_not_asked_for_when_all_is_there(texts, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    memory = fsspec.filesystem("memory")
    for path in texts.iterdir():
        memory.pipe_file(f"/texts/{path.name}", path.read_bytes())
    args = {"text_files": ["memory://texts/"], "tokenizer": str(tmp_path / "tokenizer"), "prepare": "ahead"}
    args = DataArguments(**args, data_dir=str(tmp_path / "shards"), validation_fraction=0.1)
    prepare_pretraining_data(args, close_together=True, shard_tokens=600)
    before = prepare_ahead.prepare_ahead(args, BLOCK, shard_tokens=600)
    memory.rm("/texts", recursive=True)
    after = prepare_ahead.prepare_ahead(args, BLOCK)
    for windows, others in zip(before[1:], after[1:], strict=True):
        assert windows.manifest == others.manifest and len(windows) == len(others)
    assert after[1].complete and len(after[1].bounds) == len(before[1].bounds) > 3


def test_a_child_that_was_killed_is_said_so(texts, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    args = DataArguments([str(texts)], tokenizer=str(tmp_path / "tokenizer"), data_dir=str(tmp_path / "shards"))
    child = prepare_ahead.PreparingProcess(args, {})
    assert child.problem() is None
    child.stop()
    for _ in range(2):
        assert child.problem() == "the process that tokenizes the text was ended by signal SIGKILL"
