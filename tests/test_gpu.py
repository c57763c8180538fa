"""What only a GPU can show. Skipped, and so not known to hold, where there is none."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.sample_data import docstring_conversations
from llmkit.data.tokenizer import train_bpe_tokenizer

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_step_equals_stock(tmp_path, compiled):
    torch.manual_seed(0)
    config = GPT2Config(n_positions=256, n_embd=256, n_layer=4, n_head=4)
    ours = GPT2LMHeadModel(config).cuda().train()
    ours.save_pretrained(tmp_path)
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).cuda().train()
    ids = torch.randint(0, 50257, (8, 256), device="cuda")
    losses = []
    for model in (torch.compile(ours, fullgraph=True) if compiled else ours, stock):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    mine, theirs = ours.transformer.wte.weight.grad, stock.transformer.wte.weight.grad
    assert (mine - theirs).norm() / theirs.norm() < 2e-2


def test_peak_memory_is_at_most_half_of_stock():
    peaks = []
    for library in ("llmkit", "transformers"):
        classes = __import__(library)
        sizes = {"n_positions": 1024, "n_embd": 256, "n_layer": 2, "n_head": 4}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = classes.GPT2LMHeadModel(classes.GPT2Config(**sizes)).cuda().train()
        ids = torch.randint(0, 50257, (16, 1024), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del model, ids, loss
        torch.cuda.empty_cache()
    assert peaks[0] * 2 < peaks[1], peaks


def test_recipe_on_a_gpu(tmp_path):
    """bf16, TF32 and compile are chosen by themselves, and MFU is logged where the GPU's peak is known."""
    command = [sys.executable, "recipes/pretrain.py", "--output_dir", str(tmp_path / "run"), "--max_steps", "20"]
    done = subprocess.run([*command, "--logging_steps", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bf16 autocast, TF32, sdpa attention, compile on" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    if "H200" in torch.cuda.get_device_name():
        assert 0 < steps[-1]["mfu"] < 1


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_phi2_adapter_peak_memory(tmp_path, monkeypatch, quantization):
    """Phi-2's real shape with random weights, 1,024 tokens, batch 1: under 6 GB in 4 bits."""
    base = tmp_path / "phi-2"
    # The defaults are Phi-1's; these are Phi-2's.
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = transformers.PhiConfig(**sizes, vocab_size=51200, partial_rotary_factor=0.4, dtype="bfloat16")
    with torch.device("cuda"):
        transformers.PhiForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    train_bpe_tokenizer(docstring_conversations(), 4096).save_pretrained(base)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    arguments = ["--config", str(ROOT / "recipes" / "sft_qlora_quickstart.yaml"), "--model", str(base)]
    arguments += ["--quantization", quantization, "--max_length", "1024", "--activation_checkpointing", "true"]
    arguments += ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--max_steps", "4"]
    arguments += ["--gradient_accumulation_steps", "1", "--logging_steps", "1", "--sample_tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["sft_qlora.py", *arguments, "--output_dir", str(tmp_path / "run")])
    runpy.run_path(str(ROOT / "recipes" / "sft_qlora.py"), run_name="__main__")
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"{quantization}: {peak:.2f} GB")
    assert peak < (6 if quantization == "nf4" else 14)
