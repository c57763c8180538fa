"""Every command answers `--help` and a mistake at once, and imports no library that it has no use for."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import cli
from llmkit.recipe_kinds import LIGHT

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "pyarrow",
    "tokenizers",
    "matplotlib",
}


def answer(*argv: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What a command answers, and the heavy libraries that it imported for that."""
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done, imported & HEAVY


MISTAKES = [
    ("recipes/pretrain.py --max_stesp 3", "did you mean --max_steps"),
    ("recipes/pretrain.py --max_steps many", "invalid int value"),
    ("recipes/pretrain.py --config recipes/nope.yaml", "cannot read the recipe"),
    ("recipes/sft_qlora.py --config recipes/pretrain_quickstart.yaml", "llmkit train"),
    ("recipes/pretrain.py --learning_rate nan", "learning_rate=nan: must be at least 0"),
    ("recipes/sft_qlora.py --per_device_train_batch_size 0", "must be at least 1"),
    ("-m llmkit nonsense", "invalid choice"),
    ("-m llmkit train recipes/pretrain_quickstart.yaml --logging_steps 0", "logging_steps=0.0: must be above 0"),
    ("-m llmkit train pretrain_quickstart --max_stesp 3", "did you mean --max_steps"),
    ("-m llmkit train pretrain_quickstart --tokenizer ./nope", "tokenizer='./nope': there is no such"),
    ("-m llmkit train pretrain_quickstart --text_files nope.txt", "text_files: there is no file"),
    ("-m llmkit train pretrain_quickstart --validation_fraction 2", "validation_fraction=2.0: it lies between"),
    ("-m llmkit train pretrain_quickstart --init_from ./nope", "init_from='./nope': there is no such"),
    ("-m llmkit train pretrain_quickstart --n_embd 130 --n_head 4", "n_embd=130 is not divisible by n_head=4"),
    ("-m llmkit train pretrain_gpt2_124m --preset 117M", "unknown preset '117M'"),
    ("-m llmkit audit sft_qlora --max_lenght 3", "did you mean --max_length"),
    ("-m llmkit lr-find --config recipes/pretrain_nope.yaml", "no such file"),
    ("-m llmkit train", "no recipe"),
    ("-m llmkit train pretrain_quickstart --num_processes", "--num_processes: expected one argument"),
    ("-m llmkit train recipes/nope.yaml", "no such file"),
    ("-m llmkit train recipes/pretrain_quickstart.yaml --lr_schedule sine", "invalid choice"),
    ("-m llmkit train recipes/sft_qlora.yaml", "llmkit sft"),
    ("-m llmkit sft recipes/sft_qlora.yaml --num_processes 2 --lora_r x", "invalid int value"),
    ("-m llmkit sft sft_qlora_quickstart --model ./nope", "model='./nope': there is no such"),
    ("-m llmkit sft sft_qlora_quickstart --data_files nope.jsonl", "data_files: there is no file"),
    ("-m llmkit prefer dpo_qlora_quickstart --max_stesp 3", "did you mean --max_steps"),
    ("-m llmkit prefer dpo_qlora_quickstart --adapter ./nope", "adapter='./nope': there is no such"),
    ("-m llmkit lr-find --config recipes/pretrain_quickstart.yaml --max_stesp 3", "did you mean --max_steps"),
    ("-m llmkit lr-find --config recipes/pretrain_quickstart.yaml --min_lr 3", "min_lr=3 and max_lr=1"),
    ("-m llmkit audit recipes/sft_qlora.yaml --max_lenght 3", "did you mean --max_length"),
    ("-m llmkit audit recipes/nope.yaml", "no such file"),
    ("-m llmkit generate recipes/nope x", "no such file"),
    ("-m llmkit generate recipes x", "no checkpoint in this folder"),
    ("-m llmkit generate gpt2 x --temperature -1", "temperature is -1.0"),
    ("-m llmkit chat recipes/nope", "no such file"),
    ("-m llmkit compare recipes/nope gpt2 --prompts README.md", "no such file"),
    ("-m llmkit compare gpt2 gpt2 --prompts recipes/nope.txt", "no such file"),
    ("-m llmkit eval recipes/nope", "no such file"),
    ("-m llmkit eval gpt2 --batch_size 0", "batch_size"),
    ("-m llmkit eval gpt2 --data_dir recipes/nope", "no such file"),
    ("-m llmkit eval gpt2 --text_files recipes/nope.txt", "there is no file"),
    ("-m llmkit eval gpt2 --hellaswag recipes/nope.jsonl", "no such file"),
    ("-m llmkit merge recipes/nope merged", "no such file"),
    ("-m llmkit merge gpt2 recipes", "is there already"),
    ("-m llmkit push recipes/nope me/x", "no such file"),
    ("-m llmkit push recipes me/x", "no checkpoint in this folder"),
    ("-m llmkit verify recipes", "no checkpoint in this folder"),
    ("-m llmkit report recipes/nope", "no such file"),
    ("-m llmkit report recipes", "is not the folder of a run"),
    ("-m llmkit runs recipes", "no run is in recipes"),
    ("-m llmkit blame recipes --step 1", "is not the folder of a run"),
    ("-m llmkit plan recipes/nope", "no such file"),
    ("-m llmkit plan pretrain_quickstart --max_stesp 3", "did you mean --max_steps"),
    ("-m llmkit plan pretrain_quickstart --gpu X9000", "gpu=X9000: not known"),
    ("-m llmkit doctor --recipe recipes/nope", "no such file"),
    ("-m llmkit tokenizer show x --tokenizer recipes/nope", "no such file"),
    ("-m llmkit tokenizer train --output x --kind character --vocab_size 3", "vocab_size is for --kind bpe"),
    ("-m llmkit tokenizer train --output x --text_files recipes/nope.txt", "there is no file"),
    ("-m llmkit shards prepare --output x --tokenizer recipes/nope", "no such file"),
    ("-m llmkit shards prepare --output x --text_files recipes/nope.txt", "there is no file"),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_imports_nothing_heavy(command, said):
    done, heavy = answer(*command.split())
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 0
    assert heavy == set()


def commands(parser: argparse.ArgumentParser) -> list[list[str]]:
    """All commands, as words, and their parents."""
    found: list[list[str]] = [[]]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += [[name, *words] for words in commands(inner)]
    return found


COMMANDS = commands(cli.parser())


def test_every_command_is_got_wrong_above():
    wrong = {command.split()[2] for command, _ in MISTAKES if command.startswith("-m llmkit")}
    assert {words[0] for words in COMMANDS if words} <= wrong


@pytest.mark.parametrize("command", COMMANDS, ids=map(" ".join, COMMANDS))
def test_help_imports_nothing_heavy(command):
    done, heavy = answer("-m", "llmkit", *command, "--help")
    assert (done.returncode, done.stderr, heavy) == (0, "", set())
    assert "usage: llmkit" in done.stdout


def test_help_of_a_recipe_shows_ours_by_subject_and_all_on_demand():
    short, long = (answer("-m", "llmkit", "train", "--help", *more)[0].stdout for more in ([], ["all"]))
    assert "Data:\n  --text_files list[str]\n" in short
    assert "--total_batch_tokens" in short and "--adam_epsilon" not in short
    assert "--adam_epsilon" in long and "--total_batch_tokens" in long


TUNING = {"peft", "bitsandbytes", "trl"}


@pytest.mark.parametrize(
    ("modules", "unused"),
    [
        ([dotted.rpartition(".")[0] for dotted in LIGHT], HEAVY),
        (["llmkit.runs.report", "llmkit.runs.report.index"], HEAVY),
        (["llmkit.data.corpus"], HEAVY),
        (["llmkit.data.tokenizer", "llmkit.data.token_view"], HEAVY - {"torch", "transformers", "tokenizers"}),
        (["llmkit.inference.generation", "llmkit.inference.chat"], TUNING | {"datasets", "matplotlib"}),
        (["llmkit.evaluation.held_out", "llmkit.evaluation.hellaswag"], TUNING | {"datasets", "matplotlib"}),
        (["llmkit.sharing.hub"], TUNING | {"datasets", "matplotlib"}),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_uses(modules, unused):
    done, heavy = answer("-c", f"import {', '.join(modules)}")
    assert (done.returncode, heavy & unused) == (0, set())
