"""The memory that a plan predicts is what the real step takes."""

import sys

import pytest
import torch

import process_memory
from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.planning.memory import Step, StepMemory, largest_micro_batch, step_memory
from ranks import on_ranks

# Most of it are the loss and the embeddings; activations; weights, gradients and moments.
SHAPES = [(6, 384, 50257, 4, 256), (8, 512, 8192, 4, 256), (6, 768, 50257, 1, 256)]


def grown(*shape: int) -> int:
    """By how many bytes a process grows from before the model to the peak of a real step."""
    process_memory.return_what_is_freed()
    train(1, 64, 64, 1, 8)  # the libraries' own buffers
    process_memory.count_the_peak_from_here()
    before = process_memory.resident()
    train(*shape)
    return process_memory.peak() - before


def train(n_layer: int, n_embd: int, vocab_size: int, batch_size: int, length: int) -> None:
    shape = {"n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size, "n_positions": length}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_head=n_embd // 64, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments, which are there in every step but the first
    optimizer.zero_grad()
    ids = torch.randint(vocab_size, (batch_size, length))
    model(ids, shift_labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def predicted(n_layer, n_embd, vocab_size, batch_size, length, **how) -> StepMemory:
    shape = {"n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size, "n_positions": length}
    config = GPT2Config(**shape, n_head=n_embd // 64, bos_token_id=0, eos_token_id=0)

    def loss_of(model):
        ids = torch.zeros(batch_size, length, dtype=torch.long)
        return model(ids, shift_labels=ids).loss

    step = Step(
        lambda: GPT2LMHeadModel(config), loss_of, lambda model: torch.optim.AdamW(model.parameters(), fused=True)
    )
    return step_memory(step, **{"device_type": "cpu", "autocast": None, **how})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_within_a_tenth_of_what_a_process_grows_by(shape):
    (found,) = on_ranks(1, grown, *shape)
    assert predicted(*shape).peak == pytest.approx(found, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_within_a_twentieth_of_what_a_gpu_allocates(shape):
    n_layer, n_embd, vocab_size, batch_size, length = shape
    shape = {"n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size, "n_positions": length}
    config = GPT2Config(**shape, n_head=n_embd // 64, bos_token_id=0, eos_token_id=0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = GPT2LMHeadModel(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        ids = torch.randint(vocab_size, (batch_size, length), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, shift_labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = predicted(*shape, device_type="cuda", autocast=torch.bfloat16).peak
    assert found == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)


def test_its_parts_are_those_of_the_parameters():
    memory = predicted(2, 64, 512, 2, 16)
    parameters = GPT2Config(n_layer=2, n_embd=64, n_head=1, vocab_size=512, n_positions=16).num_parameters
    assert memory.weights == memory.gradients == 4 * parameters
    assert memory.optimizer == pytest.approx(8 * parameters, rel=0.01)  # two moments, and a step for each parameter
    assert memory.activations > 0 and memory.loss_chunk > 0
    assert memory.peak == sum(vars(memory).values())


def test_a_compiled_step_keeps_the_result_of_each_activation_function(monkeypatch):
    """A compiler makes its own choice of what to keep: here is what it keeps, and what the plan counts."""
    n_layer, n_embd, vocab_size, batch_size, length = shape = 2, 256, 3072, 4, 96
    config = GPT2Config(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, n_positions=length, n_head=4)
    model, ids = GPT2LMHeadModel(config), torch.randint(vocab_size, (batch_size, length))

    def kept(model) -> tuple[int, int]:
        """Bytes that are kept for the backward pass, and how many tensors of the size of an activation function's."""
        sizes = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, shift_labels=ids)
        return sum(sizes.values()), list(sizes.values()).count(of_one)

    of_one = 4 * batch_size * length * 4 * n_embd
    # inductor's choice of what to keep, without the code that it writes
    by_compiler, count = kept(torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True))
    assert count == 2 * n_layer
    more = predicted(*shape, compiled=True).peak - predicted(*shape).peak
    assert more == pytest.approx(n_layer * of_one, rel=0.1)
    monkeypatch.setattr("llmkit.model.modeling_gpt2.RECOMPUTE_FROM", sys.maxsize)
    assert by_compiler == pytest.approx(kept(model)[0], rel=0.02)


def test_nothing_is_allocated():
    """A step that takes more than most machines have is planned on any of them."""
    assert predicted(2, 1600, 50257, 512, 1024, device_type="cuda").peak > 50e9


def test_the_largest_micro_batch_is_where_the_line_meets_the_limit():
    assert largest_micro_batch((4, 1400), (8, 1800), 2050) == 10
    assert largest_micro_batch((4, 1400), (8, 1800), 1050) == 0
