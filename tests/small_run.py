"""Runs for tests: a model with two layers on the shards of the fixture `data`, milliseconds a step; a launcher."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import PhiConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.windows import TokenWindows
from llmkit.training.arguments import PretrainArguments
from llmkit.training.pretrain_trainer import PretrainTrainer

if TYPE_CHECKING:
    from peft import PeftModel

    from llmkit.finetuning.adapters import AdapterArguments

BLOCK = 16
ULP = 2.0**-23  # the spacing of float32, relative to the number


def rounding(steps: int) -> float:
    """How far losses may be apart, relatively, that differ in the order of their sums alone.

    Which order a sum has depends on the processor's instructions and on the number of threads. A few units in the
    last place a step, for each starts from the weights that the one before has rounded.
    """
    return 4 * ULP * (1 + steps)


def trainer(data, output_dir, windows=TokenWindows, **arguments) -> PretrainTrainer:
    make, model, args = parts(data, output_dir, windows, **arguments)
    return make(model, args)


def parts(data, output_dir, windows=TokenWindows, **arguments) -> tuple[partial, GPT2LMHeadModel, PretrainArguments]:
    """What makes the trainer, of a model and arguments, and these two."""
    manifest, tokenizer = data
    defaults = {"total_batch_tokens": 8 * BLOCK, "per_device_train_batch_size": 8, "max_steps": 6, "bf16": False}
    defaults |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    defaults |= {"logging_first_step": False}  # every logging_steps, and no more
    args = PretrainArguments(output_dir=str(output_dir), use_cpu=True, **{**defaults, **arguments})
    set_seed(args.seed)
    config = GPT2Config(n_positions=BLOCK, n_embd=32, n_layer=2, n_head=2).for_tokenizer(tokenizer)
    train, validation = (windows(manifest, split, BLOCK) for split in ("train", "validation"))
    make = partial(PretrainTrainer, train_dataset=train, eval_dataset=validation, processing_class=tokenizer)
    return make, GPT2LMHeadModel(config), args


def losses(run: PretrainTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(run: PretrainTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def write_sums(folder: Path, files: int = 60, lines: int = 40) -> Path:
    """Text for pretraining, of few words. Returns the folder."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}.\n" for n in range(lines)))
    return folder


def accelerate_launch(config: str) -> list[str]:
    """`accelerate launch` with a shipped configuration, from the repository's root, before a script."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]


def logged(run: Path, key: str) -> dict[int, float]:
    """A number of a run's log, by step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def run_recipe(name: str, *arguments: object) -> None:
    """`recipes/NAME.py` in this process."""
    script = Path(__file__).parents[1] / "recipes" / f"{name}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.name, *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")


def refusal(recipe: str, arguments: list, capsys) -> str:
    """The one line with which a recipe refuses its arguments, run in this process: there is nothing to clean up."""
    with pytest.raises(SystemExit) as ended:
        run_recipe(recipe, *arguments)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def phi_config(tokenizer: PreTrainedTokenizerBase, **given) -> PhiConfig:
    """Two small layers; with more rows than the tokenizer has tokens, as Phi-2's 51,200."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 128, "partial_rotary_factor": 0.4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return PhiConfig(**{**sizes, **ends, **given})


def lively_adapter(base: PreTrainedModel, args: "AdapterArguments", std: float) -> "PeftModel":
    """A new adapter which, unlike one that no step has trained, changes what the base says."""
    from peft import get_peft_model

    model = get_peft_model(base, args.lora_config(base))
    set_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def phi_with_adapter(folder: Path, texts: list[str]) -> None:
    """Write a base of Phi's architecture into `folder / "base"`, and into `folder / "sft"` an adapter that acts on it.

    Args:
        texts: what its tokenizer is trained on.
    """
    from transformers import PhiForCausalLM

    from llmkit.data.tokenizer import train_bpe_tokenizer
    from llmkit.finetuning.adapters import AdapterArguments, load_base_model, load_chat_tokenizer
    from llmkit.runs.run import QUANTIZATION_CONFIG

    tokenizer = train_bpe_tokenizer(texts * 3, 330)
    set_seed(0)
    PhiForCausalLM(phi_config(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    args = AdapterArguments(model=str(folder / "base"), lora_r=4, lora_alpha=8)
    base = load_base_model(args, torch.float32, torch.device("cpu"))
    lively_adapter(base, args, std=0.05).save_pretrained(folder / "sft")
    base.config.quantization_config.to_json_file(folder / "sft" / QUANTIZATION_CONFIG)
    load_chat_tokenizer(args).save_pretrained(folder / "sft")
