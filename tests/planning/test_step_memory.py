"""The memory that a plan predicts is what the real step takes."""

import os
import subprocess
import sys

import pytest
import torch

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.planning.memory import Step, StepMemory, largest_micro_batch, step_memory

# Runs real steps in a process of its own, and prints by how many bytes that grows from before the model to its peak.
MEASURE = """
import sys
import torch
from llmkit import GPT2Config, GPT2LMHeadModel

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def train(n_layer, n_embd, vocab_size, batch_size, length):
    config = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, vocab_size=vocab_size, n_positions=length,
                        bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        ids = torch.randint(vocab_size, (batch_size, length))
        model(ids, shift_labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

train(1, 64, 64, 1, 8)  # the libraries' own buffers
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = status("VmRSS")
train(*map(int, sys.argv[1:]))
print("grown", status("VmHWM") - before)
"""
SHAPES = [(6, 384, 50257, 4, 256), (8, 512, 8192, 8, 256), (12, 768, 50257, 1, 512)]


def predicted(n_layer, n_embd, vocab_size, batch_size, length, device_type="cpu", autocast=None) -> StepMemory:
    shape = {"n_layer": n_layer, "n_embd": n_embd, "vocab_size": vocab_size, "n_positions": length}
    config = GPT2Config(**shape, n_head=n_embd // 64, bos_token_id=0, eos_token_id=0)

    def loss_of(model):
        ids = torch.zeros(batch_size, length, dtype=torch.long)
        return model(ids, shift_labels=ids).loss

    step = Step(
        lambda: GPT2LMHeadModel(config), loss_of, lambda model: torch.optim.AdamW(model.parameters(), fused=True)
    )
    return step_memory(step, device_type=device_type, autocast=autocast)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_within_a_tenth_of_what_a_process_grows_by(shape):
    """With an allocator that returns what is freed at once, so that gaps in the heap are not taken for tensors."""
    command = [sys.executable, "-c", MEASURE, *map(str, shape)]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **allocator})
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split("grown ")[1])
    assert predicted(*shape).peak == pytest.approx(grown, rel=0.1)


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


def test_nothing_is_allocated():
    """A step that takes more than most machines have is planned on any of them."""
    assert predicted(2, 1600, 50257, 512, 1024, device_type="cuda").peak > 50e9


def test_the_largest_micro_batch_is_where_the_line_meets_the_limit():
    assert largest_micro_batch((4, 1400), (8, 1800), 2050) == 10
    assert largest_micro_batch((4, 1400), (8, 1800), 1050) == 0
