"""The memory that a plan predicts for fine-tuning is what the real base in 4 bits, with real adapters, takes."""

import sys

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from transformers import PhiConfig, PhiForCausalLM
from trl.trainer import add_fused_lm_head

import process_memory
from llmkit.finetuning.adapters import AdapterArguments, dtype_ledger, load_base_model
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.preference_arguments import DPOArguments, PreferenceModelArguments
from llmkit.planning.finetuning import KNOWN_BASES, finetuning_step, preference_step
from llmkit.planning.memory import StepMemory, step_memory
from ranks import on_ranks

# Of the base, its layers in 4 bits take a fifth and its embeddings, which stay, the rest.
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 12}
SIZES |= {"vocab_size": 16384, "max_position_embeddings": 1024}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
TINY |= {"vocab_size": 64, "max_position_embeddings": 16}
# Activation checkpointing, preference tuning, rows or pairs, tokens in each.
RUNS = [(True, False, 2, 512), (False, False, 1, 256), (True, True, 1, 256)]


def arguments(length: int, **given) -> SFTArguments:
    how = {"packing": True, "report_to": "none", "use_cpu": True, "optim": "adamw_torch_fused"}
    return SFTArguments(output_dir="unused", max_length=length, **{**how, **given})


def predicted(
    checkpointing: bool, pairs: bool, rows: int, length: int, device_type: str = "cpu", **given
) -> StepMemory:
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    if pairs:
        args = DPOArguments(output_dir="unused", max_length=length, report_to="none", use_cpu=True)
        model_args = PreferenceModelArguments(model="unused", lora_r=8)
        step = preference_step(PhiConfig(**SIZES), model_args, args, rows, dtype, checkpointing)
        return step_memory(step, device_type=device_type, autocast=dtype if device_type == "cuda" else None)
    adapter_args = AdapterArguments(model="unused", lora_r=8)
    step = finetuning_step(PhiConfig(**SIZES), adapter_args, arguments(length, **given), rows, dtype, checkpointing)
    autocast = dtype if device_type == "cuda" else None
    return step_memory(step, device_type=device_type, autocast=autocast)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    found = []
    for name, sizes in (("base", SIZES), ("tiny", TINY)):
        folder = tmp_path_factory.mktemp(name)
        PhiForCausalLM(PhiConfig(**sizes)).save_pretrained(folder)
        found.append(str(folder))
    return found[0], found[1]


def grown(folders: tuple[str, str], device: str, run: tuple[bool, bool, int, int]) -> int:
    """By how many bytes this process, or what is allocated on the GPU, grows from before the base to its peak."""
    checkpointing, pairs, *shape = run
    process_memory.return_what_is_freed()
    take_a_step(folders[1], torch.device(device), checkpointing, pairs, 1, 8)  # the libraries' own buffers
    before = process_memory.resident() if device == "cpu" else torch.cuda.memory_allocated()
    take_a_step(folders[0], torch.device(device), checkpointing, pairs, *shape)
    return (process_memory.peak() if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def take_a_step(folder: str, device: torch.device, checkpointing: bool, pairs: bool, rows: int, length: int) -> None:
    """Load a base and take a step, as ConversationTrainer does."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if pairs:
        adapter_args, step_of = PreferenceModelArguments(model=folder, lora_r=8), preference_step
        args = DPOArguments(output_dir="unused", max_length=length, report_to="none")
    else:
        adapter_args, step_of = AdapterArguments(model=folder, lora_r=8), finetuning_step
        args = SFTArguments(output_dir="unused", max_length=length, packing=True, report_to="none")
    base = load_base_model(adapter_args, dtype, device)
    for p in base.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()  # those on a CPU lie in the file's pages, all of which would count
    base.config.use_cache = False
    if checkpointing:
        (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
        base.enable_input_require_grads()
    model = get_peft_model(base, adapter_args.lora_config(base), autocast_adapter_dtype=False).train()
    if pairs:
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, fused=True)
    loss_of = step_of(base.config, adapter_args, args, rows, dtype).loss_of
    if device.type == "cpu":
        process_memory.count_the_peak_from_here()
    else:
        torch.cuda.reset_peak_memory_stats()
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments, which are there in every step but the first
    optimizer.zero_grad()
    with device, torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
        loss = loss_of(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_within_a_tenth_of_what_a_process_grows_by(folders, run):
    (found,) = on_ranks(1, grown, folders, "cpu", run)
    assert predicted(*run).peak == pytest.approx(found, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_within_a_twentieth_of_what_a_gpu_allocates(folders, run):
    found = predicted(*run, device_type="cuda").peak
    assert [found] == pytest.approx(on_ranks(1, grown, folders, "cuda", run), rel=0.05)


def test_the_weights_are_those_of_a_base_that_was_loaded(folders):
    """To the byte, but for 16 numbers of each layer: the code book that all weights share."""
    base = load_base_model(AdapterArguments(model=folders[0]), torch.float32, torch.device("cpu"))
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    sizes = sum(p.numel() * p.element_size() for p in base.parameters())
    for layer in layers:
        state = layer.weight.quant_state
        sizes += state.absmax.nbytes + state.state2.absmax.nbytes + state.code.nbytes
    adapters = 8 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)) * 4  # layers x rank x (q, k, v, dense, fc1, fc2) x bytes
    buffers = sum(buffer.nbytes for buffer in base.buffers())
    memory = predicted(True, False, 1, 8)
    assert memory.gradients == adapters and memory.optimizer == pytest.approx(2 * adapters, rel=1e-3)
    assert memory.weights == sizes + adapters + buffers
    assert "nf4" in dtype_ledger(base)


def test_rows_that_are_not_packed_and_a_base_that_is_not_quantized():
    assert predicted(True, False, 2, 64, packing=False).weights == predicted(True, False, 2, 64).weights
    adapter_args = AdapterArguments(model="unused", quantization="none")
    step = finetuning_step(PhiConfig(**TINY), adapter_args, arguments(16), 1, torch.float32)
    memory = step_memory(step, device_type="cpu", autocast=None)
    with torch.device("meta"):
        dense = sum(p.numel() for p in PhiForCausalLM(PhiConfig(**TINY)).parameters())
    assert memory.weights >= 4 * dense + memory.gradients


def test_nothing_of_it_stays_behind():
    """bitsandbytes keeps what it has computed once; a tensor without content would break what is quantized later."""
    predicted(True, False, 1, 8)
    _, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    assert state.state2.code.abs().max() > 0


def test_the_known_base_has_the_size_that_its_page_says():
    with torch.device("meta"):
        model = PhiForCausalLM(KNOWN_BASES["microsoft/phi-2"])
    assert sum(p.numel() for p in model.parameters()) == 2_779_683_840
