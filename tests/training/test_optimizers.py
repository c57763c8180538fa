"""Muon with AdamW is both of them, each on its own parameters, and one optimizer to schedules and checkpoints."""

import copy
import shutil

import pytest
import torch
from torch.optim import AdamW

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.errors import UserError
from llmkit.training.arguments import PretrainArguments
from llmkit.training.optimizers import MatrixMuon, MuonWithAdamW
from small_run import losses, trainer, weights

MUON = {"optim": "muon", "learning_rate": 3e-3, "muon_learning_rate": 2e-2, "weight_decay": 0.1}


def named_groups(run) -> list[set[str]]:
    names = {id(p): name for name, p in run.model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in run.create_optimizer().param_groups]


def test_groups(data, tmp_path):
    """Every parameter is in one group; matrices of the layers in Muon's; LayerNorms and biases without decay."""
    run = trainer(data, tmp_path, **MUON)
    embeddings, vectors, matrices = named_groups(run)
    assert embeddings == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert matrices == {
        f"transformer.h.{n}.{name}.weight"
        for n in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert vectors == {name for name, p in run.model.named_parameters() if p.ndim == 1}
    groups = run.optimizer.param_groups
    assert [group["lr"] for group in groups] == [3e-3, 3e-3, 2e-2]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    decayed, rest = named_groups(trainer(data, tmp_path, weight_decay=0.1))
    assert decayed == embeddings | matrices and rest == vectors


def test_what_is_frozen_has_no_optimizer(data, tmp_path):
    run = trainer(data, tmp_path, **MUON)
    run.model.transformer.h[0].requires_grad_(False)
    run.model.transformer.wpe.requires_grad_(False)
    before = weights(run)
    run.train()
    moved = {name for name, weight in weights(run).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, p in run.model.named_parameters() if p.requires_grad}


def test_muons_learning_rate_is_the_others_by_default():
    assert PretrainArguments(output_dir="x", use_cpu=True, optim="muon", learning_rate=2e-3).muon_learning_rate == 2e-3


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def test_a_step_is_muons_and_adamws():
    """Beside the two optimizers of torch on copies of the parameters, with a schedule that changes the rates."""
    model = small_model()
    twin = copy.deepcopy(model)
    matrices = [[p for p in m.transformer.h.parameters() if p.ndim == 2] for m in (model, twin)]
    others = [
        [p for p in m.parameters() if not any(p is q for q in mine)]
        for m, mine in zip((model, twin), matrices, strict=True)
    ]
    ours = {"lr": 3e-2, "dtype": torch.bfloat16, "parts": [1] * len(matrices[0])}
    both = MuonWithAdamW(AdamW(others[0], lr=1e-2, fused=True), MatrixMuon(matrices[0], **ours))
    torchs = torch.optim.Muon(matrices[1], lr=3e-2, adjust_lr_fn="match_rms_adamw")
    apart = [AdamW(others[1], lr=1e-2, fused=True), torchs]
    ids = torch.randint(0, 64, (4, 8))
    for step in range(4):
        for m in (model, twin):
            m.zero_grad()
            m(ids, labels=ids).loss.backward()
        for group in [*both.param_groups, *(group for optimizer in apart for group in optimizer.param_groups)]:
            group["lr"] *= 0.7
        both.step()
        for optimizer in apart:
            optimizer.step()
        if step == 1:  # saved and loaded in the middle
            state = copy.deepcopy(both.state_dict())
            both = MuonWithAdamW(AdamW(others[0], lr=1.0, fused=True), MatrixMuon(matrices[0], **(ours | {"lr": 1.0})))
            both.load_state_dict(state)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert set(both.state) == set(model.parameters())


def one_step(matrix: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype, parts: int = 1) -> torch.Tensor:
    """Of MatrixMuon at a rate of 0.01, without the weight decay."""
    parameter = torch.nn.Parameter(matrix.clone())
    parameter.grad = gradient.clone()
    MatrixMuon([parameter], [parts], dtype, lr=1e-2, weight_decay=0.1).step()
    return parameter.detach() - matrix * (1 - 1e-2 * 0.1)


@pytest.mark.parametrize("shape", [(16, 48), (16, 16), (64, 16)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_the_update_does_not_ask_for_the_orientation(shape, dtype, rounding):
    """A matrix stored as (in, out), as here, and its transpose, as in nn.Linear, take the same step."""
    torch.manual_seed(0)
    matrix, gradient = torch.randn(shape), torch.randn(shape)
    step = one_step(matrix, gradient, dtype)
    linears = one_step(matrix.T.contiguous(), gradient.T.contiguous(), dtype).T
    assert (step - linears).norm() / step.norm() < rounding, "more than the rounding of the iteration"
    assert 0.1 < step.square().mean().sqrt() / 1e-2 < 0.3, (
        "about the root mean square of AdamW's step, 0.2 of the rate"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_does_not_ask_how_many_matrices_are_computed_together(dtype, monkeypatch):
    """The matrices of three layers at once, some at a time, and each by itself.

    Zeros that take a step at a rate of 1 without decay are the step.
    """
    torch.manual_seed(0)
    shapes = [(16, 48), (16, 16), (16, 64), (64, 16)] * 3
    gradients = [torch.randn(shape) for shape in shapes]
    found = []
    for at_once in (2**22, 2 * 64 * 16, 1):
        monkeypatch.setattr("llmkit.training.optimizers.AT_ONCE", at_once)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer = MatrixMuon(parameters, [3, 1, 1, 1] * 3, dtype, lr=1.0)
        found.append((len(list(optimizer.rounds(parameters))), parameters))
        optimizer.step()
    assert [rounds for rounds, _ in found] == [1, 5, 12]
    for _, parameters in found[1:]:
        for together, apart in zip(found[0][1], parameters, strict=True):
            assert together.norm() > 0.1
            assert (together - apart).norm() <= 10 * torch.finfo(dtype).eps * together.norm()


def test_query_key_and_value_are_matrices_of_their_own(data, tmp_path):
    """Each third of c_attn takes the step that torch's Muon takes with it alone; no other weight has parts."""
    torch.manual_seed(0)
    matrix, gradient = torch.randn(16, 48), torch.randn(16, 48)
    thirds = [torch.nn.Parameter(third.contiguous()) for third in matrix.chunk(3, dim=1)]
    for third, its_gradient in zip(thirds, gradient.chunk(3, dim=1), strict=True):
        third.grad = its_gradient.contiguous()
    torch.optim.Muon(thirds, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    expected = torch.cat([third.detach() for third in thirds], dim=1) - matrix * (1 - 1e-2 * 0.1)
    assert torch.equal(one_step(matrix, gradient, torch.bfloat16, parts=3), expected)
    run = trainer(data, tmp_path, **MUON)
    names = {id(p): name for name, p in run.model.named_parameters()}
    muon = run.create_optimizer().muon
    of_three = [names[id(p)] for p, n in zip(muon.param_groups[0]["params"], muon.parts, strict=True) if n == 3]
    assert of_three == [f"transformer.h.{n}.attn.c_attn.weight" for n in (0, 1)] and set(muon.parts) == {1, 3}


def test_the_iteration_is_in_float32_where_bfloat16_is_slow(data, tmp_path, monkeypatch):
    """The singular values are what the polynomial makes of them, to float32's rounding; bfloat16's is a thousandth."""
    monkeypatch.setattr("llmkit.training.pretrain_trainer.bf16_is_fast", lambda device_type: False)
    muon = trainer(data, tmp_path, **MUON).create_optimizer().muon
    assert isinstance(muon, MatrixMuon) and muon.dtype is torch.float32
    torch.manual_seed(0)
    gradient = torch.randn(16, 48)
    u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / gradient.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = -1e-2 * 0.2 * 48**0.5 * (u * s) @ v
    step = one_step(torch.zeros(16, 48), gradient, muon.dtype)  # its size does not matter
    assert (step - expected).norm() / expected.norm() < 1e-5
    assert (one_step(torch.zeros(16, 48), gradient, torch.bfloat16) - expected).norm() / expected.norm() > 1e-3


def test_resumed_run_ends_with_the_same_bits(data, tmp_path):
    how = {**MUON, "save_strategy": "steps", "save_steps": 4, "max_steps": 8, "per_device_train_batch_size": 4}
    whole = trainer(data, tmp_path / "whole", **how)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0] - 0.5, "nothing was learned"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = trainer(data, tmp_path / "again", **how)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-4"))
    assert losses(again)[-4:] == losses(whole)[-4:]
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(whole).items())
    run = trainer(data, tmp_path / "whole", **{**how, "muon_learning_rate": 1e-2})
    with pytest.raises(UserError, match="resumed with muon_learning_rate=0.01, and its run had 0.02"):
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_the_log_has_both_rates(data, tmp_path):
    run = trainer(data, tmp_path, **MUON, warmup_steps=3)
    run.train()
    rates = [(e["learning_rate"], e["lr/muon"]) for e in run.state.log_history if "loss" in e]
    assert rates[0] == pytest.approx((1e-3, 2e-2 / 3)) and rates[2] == pytest.approx((3e-3, 2e-2))
    assert "muon, lr 0.02, and adamw, lr 0.003" in run.summary()


def test_what_is_refused(data, tmp_path):
    for given, message in [
        ({"optim": "muon", "optim_args": "a=1"}, "optim_args is not for optim: muon"),
        ({"optim": "muon", "muon_learning_rate": 0.0}, "above 0"),
        ({"muon_learning_rate": 0.1}, "muon_learning_rate is for optim: muon, not adamw_torch_fused"),
        ({"optim": "muon", "lr_schedule": "one_cycle"}, "one_cycle cycles Adam's beta1, which Muon has not"),
        ({"optim": "moun"}, "moun"),
    ]:
        with pytest.raises((UserError, ValueError), match=message):
            PretrainArguments(output_dir=str(tmp_path), use_cpu=True, **given)
    with pytest.raises(UserError, match="one_cycle cycles beta1 or momentum, and optim=adafactor has neither"):
        trainer(data, tmp_path, optim="adafactor", lr_schedule="one_cycle").train()
