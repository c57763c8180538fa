"""What a run was and what it logged, in one local file: `log.jsonl` of the run's folder."""

import json
import os
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

import llmkit
from llmkit.arguments import changed_arguments
from llmkit.dataset import TokenWindows
from llmkit.errors import UserError
from llmkit.hardware import device_name

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "bitsandbytes")


def run_record(args: TrainingArguments, model: PreTrainedModel, data: dict) -> dict:
    """What is known of a run before its first step: arguments that are not defaults, model, data, machine.

    Args:
        data: the description, the fingerprint and the sizes of what is trained on.
    """
    return {
        "arguments": {key: str(value) for key, value in changed_arguments(args).items()},
        "model": {"parameters": model.num_parameters(), "config": model.config.to_diff_dict()},
        "data": data,
        "machine": {"device": device_name(args.device), "ranks": args.world_size, "cpus": os.cpu_count()},
        "versions": {"llmkit": llmkit.__version__} | {name: version(name) for name in PACKAGES if find_spec(name)},
    }


def windows_record(train: TokenWindows, held_out: TokenWindows) -> dict:
    """`data` of a run on token shards."""
    return {
        "description": train.manifest.corpus,
        "fingerprint": train.manifest.fingerprint,
        "train_tokens": train.num_tokens,
        "validation_tokens": held_out.num_tokens,
        "tokens_per_byte": train.tokens_per_byte,
    }


class JsonlLog(TrainerCallback):
    """Everything that is logged, one JSON object a line, in `log.jsonl` of the run's folder.

    A start of the run adds a line with what it is (`run`: arguments, data, machine, versions). A resumed run goes on
    with the file of the run that it resumes, without the lines after its checkpoint.

    Args:
        output_dir: the run's folder.
        run: what is known of the run before its first step; `run["data"]["fingerprint"]` must not change on resume.
    """

    def __init__(self, output_dir: str, run: dict):
        self.path = Path(output_dir) / "log.jsonl"
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            self._check_same_data([json.loads(line)["run"] for line in kept if '"run": {' in line])
        self.path.write_text("".join(line + "\n" for line in kept))
        self.write(state.global_step, {"run": self.run})

    def _check_same_data(self, runs: list[dict]) -> None:
        if runs and runs[-1]["data"]["fingerprint"] != self.run["data"]["fingerprint"]:
            raise UserError(
                f"{self.path.parent} was trained on other data ({runs[-1]['data']['description']}) than what it would "
                f"be resumed on ({self.run['data']['description']}): give the same source and data_dir"
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.write(state.global_step, logs)

    def write(self, step: int, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **record}) + "\n")
