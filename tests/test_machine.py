"""What the machine is good for, told by names and questions that a test can give for it."""

import os
import subprocess
import sys

import pytest
import torch

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.machine import bf16_is_fast, peak_flops, set_up_generation


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H200", 989e12),
    ],
)
def test_a_peak_is_that_of_the_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_emulated_bfloat16_is_not_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not bf16_is_fast("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert bf16_is_fast("cuda")


def test_a_cpu_is_fast_at_bfloat16_that_it_has_and_may_use(monkeypatch):
    for capabilities, fast in [({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert bf16_is_fast("cpu") == (fast and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    code = """
import torch
from llmkit.machine import bf16_is_fast
torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}
assert not bf16_is_fast("cpu")
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, timeout=120)
    assert done.returncode == 0, "a limited oneDNN emulates it"


@pytest.mark.parametrize(("width", "threads"), [(32, 1), (256, 2)])
def test_a_small_model_generates_on_one_thread(width, threads):
    model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_head=2, n_embd=width, vocab_size=200, n_positions=16))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        set_up_generation(model)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# Takes a step with torch.compile as llmkit's own choice, which it is on a GPU, or as the recipe's.
TRAIN = """
import sys
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from transformers import Trainer
from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.errors import UserError
from llmkit.machine import set_up
from llmkit.training.arguments import PretrainArguments

args = PretrainArguments(
    output_dir=sys.argv[1], use_cpu=True, max_steps=1, save_strategy="no", torch_compile=True, report_to="none"
)
args.compiles_by_default = sys.argv[2] == "default"
try:
    set_up(args)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20, n_positions=8))
    ids = list(range(8))
    sgd = SGD(model.parameters())
    data = [{"input_ids": ids, "labels": ids}] * 8
    Trainer(model, args, train_dataset=data, optimizers=(sgd, ConstantLR(sgd))).train()
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("choice", ["default", "stated"])
def test_a_compiler_that_fails_is_done_without_unless_it_was_asked_for(tmp_path, choice):
    environment = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "run"), choice]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    said, *others = done.stdout.splitlines()
    if choice == "default":
        assert said.startswith("warning: torch.compile does not work here, so the run goes on without it")
        assert "train_loss" in others[-1]
    else:
        assert said.startswith("refused: torch_compile: true, and torch.compile does not work here") and not others
