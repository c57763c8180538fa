"""A step of the QLoRA recipe beside `trl sft` with the same settings, on this machine: speed and memory.

    python benchmarks/sft.py                      # a small Phi with Phi-2's vocabulary, random weights
    python benchmarks/sft.py --phi2 --steps 10    # Phi-2's own shape, random weights, for a GPU
    python benchmarks/sft.py --max_length 512 --batch_size 2 --no_packing

Both scripts run as they are, `recipes/sft_qlora.py` and `trl/scripts/sft.py`, each in a process of its own: the same
base in NF4 with double quantization, the same LoRA layers, rank and dropout, the same conversations (given to TRL as
the very tokens and labels that llmkit trains on), lengths, packing, batch, AdamW, bf16. tokens/s counts the tokens
read in the steps after the first two; memory is the growth of the process's peak from where training begins.
"""

import argparse
import json
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers.trainer
import yaml
from transformers import PhiConfig, PhiForCausalLM, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.finetuning.adapters import AdapterArguments, load_chat_tokenizer
from llmkit.finetuning.conversations import ConversationArguments, encode_all, load_conversations
from llmkit.machine import bf16_is_fast
from measuring import PeakMemory, add_options, machine, print_table, report, synchronize, take_turns, use_threads

WARMUP_STEPS = 2
RECIPE = Path(__file__).parents[1] / "recipes" / "sft_qlora.py"
PHI_LINEAR_LAYERS = ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
# Phi-2's configuration is PhiConfig's default but for these.
PHI2 = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "partial_rotary_factor": 0.4}
PHI2 |= {"num_attention_heads": 32, "vocab_size": 51200}


class Measurement(TrainerCallback):
    """Tokens per second and memory, of whatever Trainer it finds itself in; one for all, since it is not ours."""

    latest: "Measurement"

    def __init__(self):
        Measurement.latest = self
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.memory = PeakMemory()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        self.growth = self.memory.growth()


def prepare(options: argparse.Namespace, work: Path) -> None:
    """A base with random weights, conversations, and the same ones as tokens and labels."""
    conversations = ConversationArguments(validation_fraction=0.02)
    train, _ = load_conversations(conversations)
    train.rows = train.rows[: options.conversations]
    text = (message["content"] for messages in train.rows for message in messages)
    tokenizer = train_bpe_tokenizer(text, 4096)
    tokenizer.save_pretrained(work / "base")
    set_seed(0)
    small = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers, "vocab_size": options.vocab_size}
    small |= {"intermediate_size": 4 * options.hidden_size, "num_attention_heads": options.hidden_size // 64}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device("cuda" if options.phi2 and torch.cuda.is_available() else "cpu"):
        config = PhiConfig(**(PHI2 if options.phi2 else small), **ends, max_position_embeddings=2048)
        model = PhiForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(work / "base")
    with (work / "chats.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in train.rows)
    rows = encode_all(train, load_chat_tokenizer(AdapterArguments(model=str(work / "base"))))
    (work / "tokens").mkdir()
    rows.to_parquet(work / "tokens" / "train.parquet")


def shared_settings(options: argparse.Namespace, work: Path) -> dict:
    """What both scripts are told, in the names of TrainingArguments and SFTConfig."""
    return {
        "output_dir": str(work / options.peer.replace(" ", "_")),
        "max_length": options.max_length,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_steps": options.steps,
        "learning_rate": 2e-4,
        "max_grad_norm": 0.3,
        "bf16": options.bf16,
        "optim": "adamw_torch_fused",
        "activation_checkpointing": options.checkpointing,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    }


def run_llmkit(options: argparse.Namespace, work: Path) -> None:
    ours = {"model": str(work / "base"), "data_files": [str(work / "chats.jsonl")], "eval_on_start": False}
    run_script(RECIPE, work, shared_settings(options, work) | ours | {"packing": not options.no_packing})


def run_trl(options: argparse.Namespace, work: Path) -> None:
    from trl.scripts import sft

    theirs = trl_settings(options, work, work / "tokens") | {"packing": not options.no_packing}
    theirs |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    run_script(Path(sft.__file__), work, shared_settings(options, work) | theirs)


def trl_settings(options: argparse.Namespace, work: Path, data: Path) -> dict:
    """What TRL's scripts are told beside `shared_settings`: the same base in the same 4 bits, the same layers."""
    dtype = "bfloat16" if options.bf16 else "float32"
    told = {"model_name_or_path": str(work / "base"), "dataset_name": str(data), "dtype": dtype}
    told |= {"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True, "attn_implementation": "sdpa"}
    return told | {"lora_target_modules": PHI_LINEAR_LAYERS, "use_cpu": not torch.cuda.is_available()}


def run_script(script: Path, work: Path, settings: dict) -> None:
    config = work / f"{script.stem}_{Path(settings['output_dir']).name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    transformers.trainer.DEFAULT_CALLBACKS.append(Measurement)
    sys.argv = [str(script), "--config", str(config)]
    runpy.run_path(str(script), run_name="__main__")


def figures_of(options: argparse.Namespace) -> dict[str, float]:
    """What was measured in this process; the tokens per second are those of full rows."""
    found = Measurement.latest
    steps = len(found.ends) - WARMUP_STEPS
    tokens = steps * options.batch_size * options.accumulation * options.max_length
    seconds = found.ends[-1] - found.ends[WARMUP_STEPS - 1]
    return {"tokens/s": tokens / seconds, "ms/step": 1e3 * seconds / steps, "memory MB": found.growth / 1e6}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--no_packing", action="store_true", help="pad: the tokens/s then count the padding")
    return parse_shape(parser)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options of the model, the batch and the rounds."""
    add_options(parser, rounds=3)
    parser.add_argument("--phi2", action="store_true", help="Phi-2's shape: 2.8 billion parameters")
    parser.add_argument("--hidden_size", type=int, default=256, help="of the small Phi, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the small Phi")
    parser.add_argument("--vocab_size", type=int, default=51200, help="of the small Phi's head")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--work", help=argparse.SUPPRESS)


def parse_shape(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    options.bf16 = bf16_is_fast("cuda" if torch.cuda.is_available() else "cpu")
    return options


def shape_name(options: argparse.Namespace) -> str:
    return "Phi-2's shape" if options.phi2 else f"a Phi of {options.layers} layers, {options.hidden_size} wide"


def compare(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, Path], None],
    peers: dict[str, Callable[[argparse.Namespace, Path], None]],
    batch: str,
    figures: dict[str, str],
) -> None:
    """Prepare a folder, let the peers take turns, each in a process of its own, and print the table.

    Args:
        peers: what runs each of them.
        batch: a step's batch, in words.
        figures: the columns and their formats.
    """
    use_threads(options.threads)
    if options.peer:
        peers[options.peer](options, Path(options.work))
        report(figures_of(options))
        return
    disable_progress_bar()
    datasets.disable_progress_bars()
    work = Path(tempfile.mkdtemp())
    try:
        prepare(options, work)
        sys.argv += ["--work", str(work)]
        print(
            f"{shape_name(options)}, NF4, LoRA r 16, {batch}, {'bf16' if options.bf16 else 'float32'}, checkpointing "
            f"{'on' if options.checkpointing else 'off'}; {options.rounds} rounds of {options.steps} steps"
        )
        print(machine("trl", "peft", "bitsandbytes"))
        print_table(take_turns(list(peers), options.rounds), figures)
    finally:
        shutil.rmtree(work)


def main() -> None:
    options = parse()
    peers = {"llmkit": run_llmkit, "trl sft": run_trl}
    batch = f"{options.batch_size} x {options.max_length} tokens x {options.accumulation}"
    batch += f", packing {'off' if options.no_packing else 'on'}"
    compare(options, prepare, peers, batch, {"tokens/s": ",.0f", "ms/step": ",.0f", "memory MB": ",.0f"})


if __name__ == "__main__":
    main()
