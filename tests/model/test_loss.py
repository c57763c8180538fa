"""The chunked loss and its gradients are those of the plain one, whatever is cut, padded, ignored or frozen."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llmkit.model import loss
from llmkit.model.loss import linear_cross_entropy
from llmkit.planning.memory import LiveBytes

ROWS, VOCAB, WIDTH = 37, 211, 24


def tensors(dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"hidden": (ROWS, WIDTH), "weight": (VOCAB, WIDTH), "bias": (VOCAB,)}
    return {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def targets() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, VOCAB, (ROWS,)).where(torch.rand(ROWS) > 0.3, -100)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("elements", [1, 5 * VOCAB, 2**20])  # a row at a time, chunks that do not divide, one chunk
def test_loss_and_gradients_are_those_of_cross_entropy(with_bias, elements, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", elements)
    ours, plain = tensors(), tensors()
    if not with_bias:
        del ours["bias"], plain["bias"]
    (linear_cross_entropy(ours["hidden"], ours["weight"], targets(), bias=ours.get("bias")) * 3).backward()
    expected = F.cross_entropy(F.linear(plain["hidden"], plain["weight"], plain.get("bias")), targets())
    (expected * 3).backward()
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name].grad, tensor.grad, atol=1e-6, rtol=1e-5)


def test_logits_far_apart_neither_overflow_nor_vanish():
    ours, plain = tensors(), tensors()
    found = linear_cross_entropy(ours["hidden"] * 100, ours["weight"], targets())
    expected = F.cross_entropy(plain["hidden"] * 100 @ plain["weight"].t(), targets())
    assert expected > 200  # nats: a softmax computed first would be zero at some targets
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours["weight"].grad, plain["weight"].grad, atol=1e-4, rtol=1e-4)


def test_bfloat16_autocast_is_as_near_as_the_plain_loss():
    exact, ours, plain = tensors(torch.float64), tensors(), tensors()
    F.cross_entropy(exact["hidden"] @ exact["weight"].t(), targets()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(ours["hidden"], ours["weight"], targets()).backward()
        F.cross_entropy(F.linear(plain["hidden"], plain["weight"]), targets()).backward()
    for name in ("hidden", "weight"):
        error = {kind: (t[name].grad - exact[name].grad).norm() for kind, t in (("ours", ours), ("plain", plain))}
        assert error["ours"] < 1.2 * error["plain"]
        assert error["ours"] < 0.01 * exact[name].grad.norm()


@pytest.mark.parametrize("frozen", [{"weight", "bias"}, {"hidden"}, {"hidden", "weight", "bias"}])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen):
    ours, all_trained = tensors(), tensors()
    linear_cross_entropy(**all_trained, targets=targets()).backward()
    for name in frozen:
        ours[name].requires_grad_(False)
    value = linear_cross_entropy(**ours, targets=targets())
    if value.requires_grad:
        value.backward()
    for name, tensor in ours.items():
        if name in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, all_trained[name].grad)


def test_no_targets_is_a_sum_of_zero():
    ours = tensors()
    ignored = torch.full((ROWS,), -100)
    linear_cross_entropy(ours["hidden"], ours["weight"], ignored, num_items=7).backward()
    assert ours["hidden"].grad.abs().sum() == ours["weight"].grad.abs().sum() == 0
    empty = linear_cross_entropy(ours["hidden"][:0], ours["weight"], ignored[:0], num_items=7)
    assert empty == 0


def test_a_second_backward_pass_is_refused():
    ours = tensors()
    value = linear_cross_entropy(ours["hidden"], ours["weight"], targets())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


def test_one_chunk_of_logits_is_alive_and_no_copy_of_the_weight(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 2**18)
    rows, vocab, width = 2048, 5001, 64
    with FakeTensorMode(), LiveBytes() as live:
        hidden, weight = torch.zeros(rows, width, requires_grad=True), torch.zeros(vocab, width, requires_grad=True)
        ignored = torch.zeros(rows, dtype=torch.long)
        before = live.now
        linear_cross_entropy(hidden, weight, ignored)
        gradients = 4 * width * (rows + vocab)
        assert gradients + 4 * 2**18 < live.peak - before < gradients + 4 * 2**18 * 1.2


@pytest.mark.slow
def test_compiled_gradients_are_the_eager_ones(monkeypatch):
    """Over several chunks, with a bias: what is summed in place is where compilers went wrong."""
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 10 * VOCAB)
    eager, compiled = tensors(), tensors()
    linear_cross_entropy(**eager, targets=targets()).backward()
    torch.compile(linear_cross_entropy, fullgraph=True)(**compiled, targets=targets()).backward()
    for name, tensor in eager.items():
        assert tensor.grad.abs().sum() > 0
        torch.testing.assert_close(compiled[name].grad, tensor.grad, atol=1e-6, rtol=1e-5)
