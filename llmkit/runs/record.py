"""What a run was and what it logged, in one local file: `log.jsonl` of the run's folder."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

import llmkit
from llmkit.data.ahead import AheadWindows
from llmkit.data.mixture import MixedWindows
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.files import write_whole
from llmkit.machine import device_name
from llmkit.runs.run import LOG, read_log

# Of a model's configuration: what differs without making it another model.
NO_DIFFERENCE = {"transformers_version", "dtype", "_name_or_path", "n_ctx"}
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "bitsandbytes")


def run_record(
    kind: str,
    args: TrainingArguments,
    model: PreTrainedModel,
    data: dict,
    source: Sequence,
    decisive: Mapping[str, object],
) -> dict:
    """What is known of a run before its first step: its arguments, model, data, machine and code.

    Args:
        kind: `PRETRAINING`, `FINE_TUNING` or `PREFERENCE_TUNING`.
        args: those that were given are recorded as `arguments`, the others as `defaults`.
        data: the description, the fingerprint and the sizes of what is trained on.
        source: the dataclasses that say where data and model came from.
        decisive: what follows from several arguments and cannot change when a run is resumed, by its name.
    """
    plain = (bool, int, float, str, list, dict, type(None))
    arguments = {
        f.name: _plain(getattr(args, f.name))
        for f in dataclasses.fields(args)
        if isinstance(_plain(getattr(args, f.name)), plain) and not f.name.endswith("_token")  # a secret
    }
    changed = changed_arguments(args)
    return {
        "kind": kind,
        "arguments": {key: value for key, value in arguments.items() if key in changed},
        "defaults": {key: value for key, value in arguments.items() if key not in changed},
        "source": {key: value for part in source for key, value in changed_arguments(part).items()},
        "decisive": decisive_arguments(args, *source) | dict(decisive),
        "model": {
            "parameters": model.num_parameters(),
            "attention": model.config._attn_implementation,
            "config": model.config.to_diff_dict(),
        },
        "data": data,
        "machine": {"device": device_name(args.device), "ranks": args.world_size, "cpus": os.cpu_count()},
        "versions": {"llmkit": llmkit.__version__} | {name: version(name) for name in PACKAGES if find_spec(name)},
        "code": code_version(),
        "command": command_line(),
    }


def decisive_arguments(*parts) -> dict:
    """What a resumed run cannot change, of some dataclasses: the fields that each class names in `DECISIVE`.

    Some would give the run other batches or another objective; the optimizer's own come back with its state, so that
    others would be ignored; the rest is its schedule.
    """
    return {
        name: _plain(getattr(part, name))
        for part in parts
        for kind in type(part).__mro__
        for name in sorted(vars(kind).get("DECISIVE", ()))
    }


def _plain(value):
    return value.value if isinstance(value, Enum) else value


def code_version() -> dict | None:
    """The commit of llmkit's code, and whether a tracked file was changed; None where it is no git checkout."""
    checkout = Path(llmkit.__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def command_line(words: Sequence[str] | None = None) -> list[str]:
    """The words of a command, by default this process's, without secrets: `--hub_token X` and the like."""
    shown, hide = [], False
    for text in sys.argv if words is None else words:
        name, equals, _ = text.partition("=")
        is_secret = name.startswith("-") and name.replace("-", "_").endswith("_token")
        shown.append("***" if hide else f"{name}=***" if is_secret and equals else text)
        hide = is_secret and not equals
    return shown


def windows_record(train: TokenWindows | MixedWindows, held_out: TokenWindows | MixedWindows) -> dict:
    """`data` of a run on token shards."""
    record: dict = {
        "description": train.manifest.corpus,
        "directory": train.manifest.place,
        "fingerprint": train.manifest.fingerprint,
        "block_size": train.block_size,
        "train_tokens": train.num_tokens,
        "train_documents": train.manifest.splits["train"].documents,
        "train_bytes": train.num_bytes,
        "validation_tokens": held_out.num_tokens,
        "tokens_per_byte": held_out.tokens_per_byte,
    }
    if isinstance(train, TokenWindows):
        record["shard_group"] = train.shard_group
        record["prepare"] = "first"
        if isinstance(train, AheadWindows):
            record["prepare"], record["train_tokens"] = "ahead", train.expected_tokens or train.num_tokens
    else:
        record["sources"] = {
            name: {
                "directory": windows.manifest.place,
                "fingerprint": windows.manifest.fingerprint,
                "weights": train.weights[name],
                "train_tokens": windows.num_tokens,
                "shard_group": windows.shard_group,
            }
            for name, windows in train.sources.items()
        }
    return record


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
    now = json.loads(json.dumps(run))
    # An earlier version of llmkit may have written down fewer arguments; of a model's configuration, what is left out
    # has its default.
    before, after = was["decisive"], now["decisive"]
    compared = {key: (before[key], after[key]) for key in after if key in before}
    before, after = was["model"]["config"], now["model"]["config"]
    compared |= {key: (before.get(key), after.get(key)) for key in before | after if key not in NO_DIFFERENCE}
    for key, (value_before, value) in compared.items():
        if value_before != value:
            raise UserError(
                f"{checkpoint} would be resumed with {key}={value}, and its run had {value_before}: give the run's "
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

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(state.global_step, kwargs["logs"])

    def write(self, step: int, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._stamped(step, record)) + "\n")

    @staticmethod
    def _stamped(step: int, record: dict) -> dict:
        return {"step": step, "time": round(time.time(), 3), **record}
