"""A step of the preference recipe beside `trl dpo` with the same settings, on this machine: time and memory.

    python benchmarks/dpo.py                      # a small Phi with Phi-2's vocabulary, random weights
    python benchmarks/dpo.py --phi2 --steps 10    # Phi-2's own shape, random weights, for a GPU

Both scripts run as they are, `recipes/dpo_qlora.py` and `trl/scripts/dpo.py`, each in a process of its own: the same
base in NF4 with double quantization, the same LoRA layers, rank and dropout, the same pairs, lengths, batch, AdamW.
`trl dpo` puts a new adapter on the base, which is then the reference, and so does `llmkit`. `llmkit, adapter` goes on
from an adapter, as the recipe does by default, and keeps a frozen copy of it as the reference. ms/step is the mean of
the steps after the first two; memory is the growth of the process's peak from where training begins.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model

from llmkit.data.tokenizer import as_prompt
from llmkit.finetuning.adapters import AdapterArguments, load_base_model, load_chat_tokenizer
from llmkit.finetuning.conversations import SourceArguments
from llmkit.finetuning.preferences import load_pairs
from llmkit.runs.run import QUANTIZATION_CONFIG
from sft import add_shape, compare, parse_shape, run_script, shared_settings, trl_settings
from sft import prepare as prepare_base

RECIPE = Path(__file__).parents[1] / "recipes" / "dpo_qlora.py"


def prepare(options: argparse.Namespace, work: Path) -> None:
    """A base with random weights, a new adapter on it, and pairs as both scripts read them."""
    prepare_base(options, work)
    start = AdapterArguments(model=str(work / "base"))
    base = load_base_model(start, torch.float32, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    get_peft_model(base, start.lora_config(base)).save_pretrained(work / "adapter")
    base.config.quantization_config.to_json_file(work / "adapter" / QUANTIZATION_CONFIG)
    tokenizer = load_chat_tokenizer(start)
    tokenizer.save_pretrained(work / "adapter")
    train, _ = load_pairs(SourceArguments())
    (work / "pairs").mkdir()
    with (work / "pairs" / "train.jsonl").open("w") as file:
        for pair in train.rows[: options.pairs]:
            prompt = as_prompt(pair["prompt"][0]["content"], tokenizer)
            answers = {name: f" {pair[name]}" for name in ("chosen", "rejected")}  # the space belongs to the answer
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")
    with (work / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in train.rows[: options.pairs + 20])


def run_llmkit(options: argparse.Namespace, work: Path) -> None:
    start = {"adapter": str(work / "adapter")} if "adapter" in options.peer else {"adapter": None}
    if start["adapter"] is None:
        start["model"] = str(work / "base")
    ours = {"data_files": [str(work / "pairs.jsonl")], "eval_on_start": False, "length_prompts": 0}
    run_script(RECIPE, work, shared_settings(options, work) | start | ours)


def run_trl(options: argparse.Namespace, work: Path) -> None:
    from trl.scripts import dpo

    run_script(Path(dpo.__file__), work, shared_settings(options, work) | trl_settings(options, work, work / "pairs"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser)
    parser.add_argument("--pairs", type=int, default=400)
    options = parse_shape(parser)
    options.accumulation, options.conversations = 1, 1000
    return options


def main() -> None:
    options = parse()
    peers = {"llmkit": run_llmkit, "trl dpo": run_trl, "llmkit, adapter": run_llmkit}
    batch = f"{options.batch_size} pairs of up to 2 x {options.max_length} tokens"
    compare(options, prepare, peers, batch, {"ms/step": ",.0f", "memory MB": ",.0f"})


if __name__ == "__main__":
    main()
