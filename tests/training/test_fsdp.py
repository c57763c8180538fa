"""FSDP2 on two CPU ranks, whose parameters are really sharded over both."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmkit.runs.run import read_log
from llmkit.training.checkpoints import checkpoints_of, damage_of
from llmkit.training.optimizers import MatrixMuon, ShardedMuon
from ranks import on_ranks, printed
from small_run import losses, parts, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
MUON = {**SAVING, "optim": "muon", "learning_rate": 1e-3}
# What the launcher's configuration would say. accelerate knows FSDP on accelerators alone.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
FSDP |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block"}
FSDP |= {"FSDP_RESHARD_AFTER_FORWARD": "true"}


def train(data, folder: Path, arguments: dict, largest_file: int = 0) -> None:
    """A rank of a run, with files that may not grow past some bytes."""
    os.environ |= FSDP
    make, model, args = parts(data, folder, per_device_train_batch_size=4, **arguments)
    # private: a CPU's ranks are of a kind for which accelerate does not look at FSDP's settings.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run = make(model, args)
    assert run.is_fsdp_enabled
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    run.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.optim == "muon":
        assert isinstance(run.optimizer.optimizer.muon, ShardedMuon)
        run.save_model()


@pytest.mark.slow
def test_a_save_that_fails_leaves_the_run_and_the_earlier_checkpoints(data, tmp_path):
    """No rank waits for another that could not write: whether there is room is found out before."""
    said, _ = on_ranks(2, printed, train, data, tmp_path / "run", SAVING, 100_000)
    assert said.count("could not be saved") == 3 and "step      6/6" in said
    assert not checkpoints_of(tmp_path / "run") and not (tmp_path / "run" / ".saving").exists()


def difference_of_muons() -> float:
    """By how much a sharded matrix differs from a whole one after three steps, relative to its largest number."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    how = {"parts": [1, 3, 1, 1, 1], "dtype": torch.float32, "lr": 0.1, "weight_decay": 0.1}
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (7, 5), (1, 6), (32, 32)]  # of five, the last is alone in its round
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    sharded = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    optimizers = MatrixMuon(plain, **how), ShardedMuon(sharded, **how)
    for _ in range(3):
        for p, s in zip(plain, sharded, strict=True):
            p.grad = torch.randn_like(p)
            s.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    differences = [(s.full_tensor() - p).abs().max() / p.abs().max() for p, s in zip(plain, sharded, strict=True)]
    return max(differences).item()


@pytest.mark.slow
def test_muon_of_sharded_matrices_is_muon():
    """Tall, wide, odd and tiny matrices over two ranks, three steps: the update of one rank, to float32's rounding."""
    assert max(on_ranks(2, difference_of_muons)) <= 2**-22


@pytest.mark.slow
def test_muon_under_fsdp_trains_what_one_rank_trains_and_resumes(data, tmp_path):
    on_ranks(2, train, data, tmp_path / "run", MUON)
    alone = trainer(data, tmp_path / "alone", **{**MUON, "save_strategy": "no"})
    alone.train()
    logged = [record["loss"] for record in read_log(tmp_path / "run" / "log.jsonl") if "loss" in record]
    # An iteration in bfloat16 makes more of the rounding of sums that are added up in another order.
    assert logged == pytest.approx(losses(alone), rel=1e-4)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(damage_of(checkpoint) is None for checkpoint in checkpoints_of(tmp_path / "run"))
    resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")}
    on_ranks(2, train, data, tmp_path / "run", MUON | resume)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)
