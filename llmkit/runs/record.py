"""What a run was and what it logged, in one local file: `log.jsonl` of the run's folder."""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

import llmkit
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.files import write_whole
from llmkit.machine import device_name
from llmkit.runs.run import LOG, read_log

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "bitsandbytes")


# What a resumed run cannot change. Some would give it other batches; the optimizer's own settings come back with its
# state, so that others would be ignored; the rest is its schedule. How long it goes on is not among them, nor is
# wsd_decay_steps: a wsd run is made to be gone on with from before its decay.
DECISIVE = ("total_batch_tokens", "seed", "data_seed", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2")
DECISIVE += ("adam_epsilon", "optim", "muon_learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio")
DECISIVE += ("decay_until_step", "batch_ramp_start", "batch_ramp_tokens")
# Except that torch's OneCycleLR keeps its length in its state.
DECISIVE_FOR_ONE_CYCLE = ("max_steps", "num_train_epochs")


def run_record(args: TrainingArguments, model: PreTrainedModel, data: dict, source: Sequence = ()) -> dict:
    """What is known of a run before its first step: arguments (`defaults` where not given), model, data, machine.

    Args:
        data: the description, the fingerprint and the sizes of what is trained on.
        source: the dataclasses that say where data and model came from.
    """
    arguments = {key: value.value if isinstance(value, Enum) else value for key, value in vars(args).items()}
    plain = (bool, int, float, str, list, dict, type(None))
    arguments = {
        f.name: arguments[f.name]
        for f in dataclasses.fields(args)
        if isinstance(arguments[f.name], plain) and not f.name.endswith("_token")  # a secret
    }
    changed = changed_arguments(args)
    decisive = DECISIVE + (DECISIVE_FOR_ONE_CYCLE if args.lr_schedule == "one_cycle" else ())
    return {
        "arguments": {key: value for key, value in arguments.items() if key in changed},
        "defaults": {key: value for key, value in arguments.items() if key not in changed},
        "source": {key: value for part in source for key, value in changed_arguments(part).items()},
        "decisive": {key: arguments[key] for key in decisive if key in arguments},
        "model": {
            "parameters": model.num_parameters(),
            "attention": model.config._attn_implementation,
            "config": model.config.to_diff_dict(),
        },
        "data": data,
        "machine": {"device": device_name(args.device), "ranks": args.world_size, "cpus": os.cpu_count()},
        "versions": {"llmkit": llmkit.__version__} | {name: version(name) for name in PACKAGES if find_spec(name)},
    }


def windows_record(train: TokenWindows, held_out: TokenWindows) -> dict:
    """`data` of a run on token shards."""
    return {
        "description": train.manifest.corpus,
        "directory": str(train.manifest.directory) if train.manifest.directory else None,
        "fingerprint": train.manifest.fingerprint,
        "block_size": train.block_size,
        "train_tokens": train.num_tokens,
        "train_documents": train.manifest.splits["train"].documents,
        "train_bytes": train.num_bytes,
        "validation_tokens": held_out.num_tokens,
        "tokens_per_byte": held_out.tokens_per_byte,
    }


def check_resume(checkpoint: str | Path, run: dict) -> None:
    """Refuse to resume a checkpoint as something else than the run that wrote it, as that run's log tells.

    Args:
        run: the record of the run that would go on.

    Raises:
        UserError: other data, another model, or other settings that decide the batches or the optimizer.
    """
    log = Path(checkpoint).parent / LOG
    earlier = [record["run"] for record in read_log(log) if "run" in record] if log.exists() else []
    if not earlier:
        return
    was = earlier[-1]
    if was["data"]["fingerprint"] != run["data"]["fingerprint"]:
        raise UserError(
            f"{checkpoint} was trained on other data ({was['data']['description']}) than what it would be resumed on "
            f"({run['data']['description']}): give the same source and data_dir"
        )
    found = was["decisive"] | was["model"]["config"]
    for key, value in json.loads(json.dumps(run["decisive"] | run["model"]["config"])).items():
        if key not in ("transformers_version", "dtype", "n_ctx") and found.get(key) != value:
            raise UserError(
                f"{checkpoint} would be resumed with {key}={value}, and its run had {found.get(key)}: give the run's "
                "own setting, or start another run from its weights"
            )


def changed_arguments(arguments) -> dict:
    """The fields of a dataclass that differ from their defaults."""
    changed = {}
    for f in dataclasses.fields(arguments):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if (value := getattr(arguments, f.name)) != default:
            changed[f.name] = value
    return changed


class JsonlLog(TrainerCallback):
    """Everything that is logged, one JSON object a line, in `log.jsonl` of the run's folder.

    A start of the run adds a line with what it is (`run`: arguments, data, machine, versions). A resumed run goes on
    with the file of the run that it resumes, without the lines after its checkpoint.

    Args:
        output_dir: the run's folder.
        run: what is known of the run before its first step.
    """

    def __init__(self, output_dir: str, run: dict):
        self.path = Path(output_dir) / LOG
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.exists():
            kept = [record for record in read_log(self.path) if record["step"] <= state.global_step]
        kept.append(self._stamped(state.global_step, {"run": self.run}))
        # In one step: with an empty log a killed start would take what the run was with it.
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.write(state.global_step, logs)

    def write(self, step: int, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._stamped(step, record)) + "\n")

    @staticmethod
    def _stamped(step: int, record: dict) -> dict:
        return {"step": step, "time": round(time.time(), 3), **record}
