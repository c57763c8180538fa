"""A checkpoint is whole or not there, `latest` takes the newest whole one, and a run's folder is one run's."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkit import files
from llmkit.data.manifest import load_manifest
from llmkit.errors import UserError
from llmkit.training import checkpoints, saving
from llmkit.training.arguments import PretrainArguments
from llmkit.training.checkpoints import checkpoint_to_resume, damage_of
from ranks import on_ranks, printed
from small_run import trainer, weights

SAVING = {"save_strategy": "steps", "save_steps": 2}


def arguments(folder, **more) -> PretrainArguments:
    return PretrainArguments(output_dir=str(folder), **more)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of six steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer(data, folder, **SAVING).train()
    files.release_folder(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    yield shutil.copytree(finished, tmp_path / "run")
    files.release_folder(tmp_path / "run")


def test_a_flipped_byte_in_any_file_is_found(run):
    """The first, the middle and the last byte of every file; `latest` passes the checkpoint over."""
    last, earlier = run / "checkpoint-6", run / "checkpoint-4"
    assert damage_of(last) is None
    names = sorted(path.name for path in last.iterdir())
    assert {"complete.json", "optimizer.pt", "rng_state.pth", "config.json", "trainer_state.json"} <= set(names)
    for name in names:
        whole = (last / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            (last / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert name in damage_of(last), (name, place)
        assert checkpoint_to_resume(arguments(run, resume_from_checkpoint="latest")) == str(earlier)
        (last / name).unlink()
        assert f"{name} is missing" in damage_of(last)
        (last / name).write_bytes(whole)
    assert checkpoint_to_resume(arguments(run, resume_from_checkpoint="latest")) == str(last)


def test_what_is_passed_over_is_said(run, capsys):
    (run / "checkpoint-6" / "optimizer.pt").write_bytes(b"short")
    checkpoint_to_resume(arguments(run, resume_from_checkpoint="latest"))
    assert "passed over checkpoint-6: optimizer.pt has 5 bytes instead of" in capsys.readouterr().out
    with pytest.raises(UserError, match="checkpoint-6 is not a whole checkpoint: optimizer.pt has 5 bytes"):
        checkpoint_to_resume(arguments(run, resume_from_checkpoint=str(run / "checkpoint-6")))


def test_no_save_is_named_before_it_is_whole(data, tmp_path, monkeypatch):
    """A process that ends at any write of a save leaves no `checkpoint-4`, and `latest` is the one before."""

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    for place in ((saving, "seal"), (files, "write_whole")):
        folder = tmp_path / place[1]
        run = trainer(data, folder, **SAVING)
        run.args.save_steps = run.state.save_steps = 2
        original = getattr(*place)
        monkeypatch.setattr(
            *place, lambda *a, run=run, call=original: killed() if run.state.global_step == 4 else call(*a)
        )
        with pytest.raises(Killed):
            run.train()
        monkeypatch.undo()
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert checkpoint_to_resume(arguments(folder, resume_from_checkpoint="latest")) == str(folder / "checkpoint-2")


def test_a_run_that_branches_does_not_return_to_the_other_branch(data, run):
    branch = trainer(data, run, **SAVING)
    branch.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    aside = run / "set_aside_1"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-4", "checkpoint-6", "log.jsonl"]
    assert sum("loss" in json.loads(line) for line in (aside / "log.jsonl").read_text().splitlines()) == 6
    assert damage_of(aside / "checkpoint-6") is None
    # As if it had been killed right after its beginning.
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert checkpoint_to_resume(arguments(run, resume_from_checkpoint="latest")) == str(run / "checkpoint-2")


def test_the_last_good_checkpoint_is_never_rotated_away(data, tmp_path):
    trainer(data, tmp_path, **SAVING, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    (tmp_path / "checkpoint-9").mkdir()  # without a record it is not one, however new
    checkpoints.rotate(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


@pytest.mark.parametrize("how", ["continue", "stop"])
def test_a_save_that_fails_leaves_the_earlier_ones(data, tmp_path, monkeypatch, capsys, how):
    """A full disk at step 4, as torch tells it; at step 6 there is room again."""
    run = trainer(data, tmp_path, **SAVING, on_save_failure=how)
    save = torch.save

    def full(*args, **kwargs):
        if run.state.global_step == 4:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 320 vs 214")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    if how == "stop":
        with pytest.raises(UserError, match="the checkpoint of step 4 could not be saved: .*unexpected pos"):
            run.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
        return
    run.train()
    assert run.state.global_step == 6
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    out = capsys.readouterr().out
    assert out.count("the checkpoint of step 4 could not be saved") == 1 and "tries again at the next save" in out
    assert not (tmp_path / ".saving").exists()


def test_a_rank_without_a_folder_still_meets_the_others(data, tmp_path, monkeypatch):
    """They wait for it before they write, whether it could clear the place or not."""
    run = trainer(data, tmp_path, **SAVING)
    met = []
    monkeypatch.setattr(run.accelerator, "wait_for_everyone", lambda: met.append(run.state.global_step))

    def gone(staged):
        raise FileNotFoundError(staged)

    monkeypatch.setattr(run, "_clear_staging", gone)
    run.train()
    assert {2, 4, 6} <= set(met)


def train_with_small_files(data, folder: Path) -> None:
    run = trainer(data, folder, **SAVING)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    run.train()


def test_a_disk_that_is_really_full(data, tmp_path):
    """Files may not grow past 100 kB: what the kernel then says is a full disk's, to each of the writers."""
    (said,) = on_ranks(1, printed, train_with_small_files, data, tmp_path / "run")
    assert said.count("could not be saved") == 3 and "step      6/6" in said
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / ".saving").exists()


def test_latest_where_nothing_can_be_resumed(data, run, tmp_path):
    latest = {"resume_from_checkpoint": "latest"}
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint of .* can be resumed .*checkpoint-2: optimizer.pt is missing"):
        checkpoint_to_resume(arguments(run, **latest))
    for step in (2, 4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    with pytest.raises(UserError, match="log of a run that came to step 6, and no checkpoint to go on from"):
        checkpoint_to_resume(arguments(run, **latest, save_strategy="steps", save_steps=2))
    with pytest.raises(UserError, match="log of a run that came to step 6, and no checkpoint to go on from"):
        checkpoint_to_resume(arguments(run, **latest, save_strategy="no"))
    weights_only = tmp_path / "weights_only"
    trainer(data, weights_only, **SAVING, save_only_model=True).train()
    with pytest.raises(UserError, match="saved without optimizer"):
        checkpoint_to_resume(arguments(weights_only, **latest, save_only_model=True))


def test_a_run_killed_before_its_first_save_starts_again_and_keeps_its_log(data, tmp_path):
    run = trainer(data, tmp_path, save_strategy="steps", save_steps=5, resume_from_checkpoint="latest", max_steps=3)
    log = '{"step": 0, "time": 1.0, "run": {}}\n{"step": 3, "time": 2.0, "loss": 1.0}\n'
    (tmp_path / "log.jsonl").write_text(log)
    assert checkpoint_to_resume(run.args) is None
    run.train()
    assert (tmp_path / "set_aside_1" / "log.jsonl").read_text() == log


def test_a_second_run_into_a_folder_is_refused(data, run, tmp_path):
    with pytest.raises(UserError, match="holds the checkpoints of a run: add --resume_from_checkpoint latest"):
        checkpoint_to_resume(arguments(run))
    trainer(data, tmp_path / "no_saves").train()
    with pytest.raises(UserError, match="holds the log of a run"):
        checkpoint_to_resume(arguments(tmp_path / "no_saves"))
    with pytest.raises(UserError, match="holds the log of a run"):
        trainer(data, tmp_path / "no_saves").train()
    with pytest.raises(UserError, match="holds the log of a run"):
        checkpoint_to_resume(arguments(tmp_path / "no_saves", resume_from_checkpoint=str(run / "checkpoint-2")))


HOLDER = (
    "import sys; from llmkit.files import hold_folder; hold_folder(sys.argv[1]); print('held', flush=True); input()"
)


def test_two_processes_in_one_folder(run, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert files.is_held(run)
        with pytest.raises(UserError, match="another process is training in"):
            checkpoint_to_resume(arguments(run, resume_from_checkpoint="latest"))
        other.kill()
    assert files.is_held(run) is False
    assert checkpoint_to_resume(arguments(run, resume_from_checkpoint="latest")) == str(run / "checkpoint-6")


def test_a_kill_during_a_resume_leaves_the_log(data, run, monkeypatch):
    """With it went the record by which other settings are refused."""
    before = (run / "log.jsonl").read_text()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.runs.record.write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer(data, run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert (run / "log.jsonl").read_text() == before
    monkeypatch.undo()
    with pytest.raises(UserError, match="resumed with learning_rate"):
        trainer(data, run, **SAVING, learning_rate=0.5).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_the_best_checkpoint_is_known_after_a_resume(data, tmp_path):
    """Also in a folder that was moved."""
    how = SAVING | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.0}
    first = trainer(data, tmp_path / "first", **how, max_steps=4)
    first.train()
    assert first.state.best_model_checkpoint == str(tmp_path / "first" / "checkpoint-2")
    files.release_folder(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    again = trainer(data, tmp_path / "moved", **how, max_steps=4, resume_from_checkpoint="latest")
    again.train(resume_from_checkpoint=checkpoint_to_resume(again.args))
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    assert weights(again).keys() == weights(first).keys()


def test_an_evaluation_that_was_left_out_is_made_up_for(data, tmp_path):
    how = SAVING | {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer(data, tmp_path, **how).train()
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    found = [line for line in lines if "eval_loss" in line and json.loads(line)["step"] == 4]
    for kept in (lines, [line for line in lines if line not in found]):
        (tmp_path / "log.jsonl").write_text("".join(kept))
        trainer(data, tmp_path, **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        now = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        evaluations = [record for record in now if "eval_loss" in record and record["step"] == 4]
        assert [record["eval_loss"] for record in evaluations] == [json.loads(found[0])["eval_loss"]]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_flipped_byte_of_a_shard_is_found_before_it_is_trained_on(data, tmp_path, split):
    manifest, tokenizer = data
    shutil.copytree(manifest.directory, tmp_path / "shards")
    shard = tmp_path / "shards" / f"{split}_00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 64]) + whole[1001:])
    run = trainer((load_manifest(tmp_path / "shards"), tokenizer), tmp_path / "run")
    with pytest.raises(UserError, match=f"{split}_00000.bin is damaged"):
        run.train()
    assert run.state.global_step == 0
