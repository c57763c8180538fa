"""Generation with the KV cache, without, and by nanoGPT; llmkit's GPT-2 and the stock one; bf16, int8 and NF4.

    python benchmarks/generation.py                                    # a fresh 124M: speed and size
    python benchmarks/generation.py --nanogpt ../nanoGPT               # and the loop of a checkout of nanoGPT
    python benchmarks/generation.py --checkpoint runs/pretrain --shards data/my_shards   # and perplexity

All sample with top_k 50 from the same prompt and write the same number of tokens. In each round every variant has its
turn, so that a drift of the machine meets all of them; the table gives medians over the rounds, and the median of
each round's ratio to stock float32.
"""

import argparse
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.manifest import load_manifest
from llmkit.data.tokenizer import load_tokenizer
from llmkit.data.windows import TokenWindows
from llmkit.errors import exit_on_user_error
from llmkit.inference.generation import load_model
from llmkit.machine import device_name

REFERENCE = "stock float32"


@dataclass
class Variant:
    """A way to generate: `run(n)` writes n tokens a row after the prompt."""

    run: Callable[[int], None]
    disk: int | None = None  # bytes of the checkpoint's weights
    memory: int | None = None  # bytes of weights and of what quantizing them left
    nats: float | None = None  # mean cross-entropy of held-out tokens
    speeds: list[float] = field(default_factory=list)  # tokens/s over all rows, one a round


def with_transformers(model: PreTrainedModel, prompt: torch.Tensor, use_cache: bool = True) -> Callable[[int], None]:
    model.generation_config.eos_token_id = None  # nothing ends early

    def run(new_tokens: int) -> None:
        how = {"max_new_tokens": new_tokens, "do_sample": True, "top_k": 50, "pad_token_id": 0}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **how)
        assert output.shape[1] == prompt.shape[1] + new_tokens

    return run


def with_nanogpt(checkout: str, config: transformers.GPT2Config, prompt: torch.Tensor) -> Callable[[int], None]:
    """nanoGPT's own model, of the same size with fresh weights, and its own `generate`."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    model = nanogpt.GPT(nanogpt.GPTConfig(**sizes, block_size=config.n_positions, dropout=0.0, bias=True))
    model.to(prompt.device).eval()

    def run(new_tokens: int) -> None:
        model.generate(prompt, new_tokens, top_k=50)

    return run


def weight_bytes(model: PreTrainedModel) -> int:
    """Of all parameters and of the scales of quantized ones; a tied weight counts once."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # after llmkit, which spares us its advice on kernels

    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        elif isinstance(module, Linear8bitLt):
            total += (module.weight.SCB if module.state.SCB is None else module.state.SCB).nbytes
    return total


def bytes_on_disk(model: PreTrainedModel) -> int:
    """Of the weights' files when the model is saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, windows: TokenWindows, tokens: int) -> float:
    """Mean cross-entropy over the first windows, up to about `tokens` tokens."""
    nats = targets = 0
    for index in range(min(len(windows), math.ceil(tokens / windows.block_size))):
        ids = windows[index]["input_ids"].long()[None].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        targets += len(logits)
    return nats / targets


def build_variants(options: argparse.Namespace, folder: str, device: torch.device) -> dict[str, Variant]:
    """What is compared, by name."""
    config = AutoConfig.from_pretrained(folder)
    prompt = torch.randint(config.vocab_size, (options.batch_size, options.prompt_tokens), device=device)
    windows = None
    if options.shards:
        manifest = load_manifest(options.shards, load_tokenizer(folder))
        windows = TokenWindows(manifest, "validation", config.max_position_embeddings)

    def stock(dtype: torch.dtype) -> PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    models = {REFERENCE: stock(torch.float32), "stock bfloat16": stock(torch.bfloat16)}
    models |= {f"stock {kind}": load_model(folder, kind, device) for kind in ("int8", "nf4")}
    if config.model_type == "gpt2":
        ours = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        models = {"llmkit float32": ours, **models}
    variants = {}
    for name, model in models.items():
        disk = bytes_on_disk(model)  # before the first forward pass, which may repack the weights
        variants[name] = Variant(with_transformers(model, prompt), disk)
        variants[name].run(4)
        variants[name].memory = weight_bytes(model)
        variants[name].nats = nats_per_token(model, windows, options.eval_tokens) if windows else None
    variants[f"{REFERENCE}, no cache"] = Variant(with_transformers(models[REFERENCE], prompt, use_cache=False))
    if options.nanogpt:
        variants["nanoGPT float32"] = Variant(with_nanogpt(options.nanogpt, config, prompt))
    return variants


def measure(variants: dict[str, Variant], options: argparse.Namespace, device: torch.device) -> None:
    for variant in variants.values():
        variant.run(4)
    for _ in range(options.rounds):
        for variant in variants.values():
            start = time.perf_counter()
            variant.run(options.new_tokens)
            if device.type == "cuda":
                torch.cuda.synchronize()
            variant.speeds.append(options.batch_size * options.new_tokens / (time.perf_counter() - start))


def table(variants: dict[str, Variant]) -> str:
    """One row a variant."""
    reference = variants[REFERENCE]
    head = ["tokens/s", "min..max", "ratio", "on disk", "in memory"]
    head += [] if reference.nats is None else ["perplexity", "change"]
    lines = [f"{'':>24}" + "".join(f"{name:>14}" for name in head)]
    for name, variant in variants.items():
        ratios = [ours / theirs for ours, theirs in zip(variant.speeds, reference.speeds, strict=True)]
        cells = [f"{statistics.median(variant.speeds):,.1f}"]
        cells += [f"{min(variant.speeds):,.1f}..{max(variant.speeds):,.1f}", f"{statistics.median(ratios):.2f}"]
        cells += ["" if size is None else f"{size / 1e6:,.1f} MB" for size in (variant.disk, variant.memory)]
        if variant.nats is not None:
            cells += [f"{math.exp(variant.nats):.3f}", f"{math.exp(variant.nats - reference.nats) - 1:+.2%}"]
        lines.append((f"{name:>24}" + "".join(f"{cell:>14}" for cell in cells)).rstrip())
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="measure this one instead of a fresh model")
    parser.add_argument(
        "--shards", help="token shards whose validation split gives the perplexity; needs a checkpoint"
    )
    parser.add_argument("--eval_tokens", type=int, default=16384)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT, to measure its generate as well")
    parser.add_argument("--preset", default="124M", help="size of the fresh model (default: 124M)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.shards and not options.checkpoint:
        parser.error("--shards needs --checkpoint: a fresh model has no perplexity to speak of")
    return options


@exit_on_user_error
def main() -> None:
    options = parse()
    disable_progress_bar()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as fresh:
        folder = options.checkpoint or fresh
        if not options.checkpoint:
            GPT2LMHeadModel(GPT2Config.from_preset(options.preset)).save_pretrained(fresh)
        variants = build_variants(options, folder, device)
    print(
        f"{options.checkpoint or 'a fresh ' + options.preset}, {options.new_tokens} tokens after "
        f"{options.batch_size} x {options.prompt_tokens}; {device_name(device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {options.rounds} rounds",
        flush=True,
    )
    measure(variants, options, device)
    print(table(variants))


if __name__ == "__main__":
    main()
