"""Whether a checkpoint still is what was saved: what its folder and the log of its run say of it.

A consumer cannot tell. It reads the same files as we do, so with another activation in `config.json`, or with other
weights, it agrees with us on the wrong logits. What the right ones are is known from the time of the training alone:

- `complete.json` holds the size and the checksum of every file that was saved;
- the run's `log.jsonl` holds the model's configuration, its end token, and the loss on the validation shards, which is
  measured again here;
- the shards' manifest holds the tokenizer's fingerprint.

A checkpoint of which none of these is left is compared with its consumers only, and the report says so. This is no
protection against somebody who changes the evidence as well.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from llmkit.data.ahead import manifest_of_run
from llmkit.data.manifest import MANIFEST, Manifest, load_manifest
from llmkit.data.tokenizer import tokenizer_fingerprint
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError, reason
from llmkit.evaluation.held_out import evaluate_windows
from llmkit.files import COMPLETE, changed_file, read_record
from llmkit.model.configuration_gpt2 import GPT2Config
from llmkit.runs.record import NO_DIFFERENCE
from llmkit.runs.run import PRETRAINING, Run
from llmkit.sharing.model_card import run_of
from llmkit.sharing.staging import CONFIGS, TOKENIZER, WEIGHTS

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half the spacing of numbers at 1


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `same` is None where there is nothing to compare it with."""

    name: str
    same: bool | None
    text: str


def rounding(config: PreTrainedConfig, dtype: str) -> float:
    """How far two right computations of one model are apart, relative to the size of a logit.

    A sum of n products in float32 is off by about sqrt(n) units of rounding where errors are independent (Higham and
    Mary 2019), and a result that is kept in `dtype` by one of its units. The residual stream collects these errors
    from two such products in each layer, and the head adds one: sqrt(2 * layers + 1) of them.
    """
    width = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return math.sqrt(2 * config.num_hidden_layers + 1) * (math.sqrt(width) * UNIT["float32"] + UNIT[dtype])


def check_files(folder: Path) -> Check:
    """The files that consumers read, against the checksums that were written when they were saved."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        return Check("files", None, f"no {COMPLETE} in the folder, so nobody knows their checksums")
    except ValueError as error:
        return Check("files", False, str(error))
    read = {name: facts for name, facts in record["files"].items() if _is_read(name)}
    added = sorted(path.name for path in folder.iterdir() if _is_read(path.name) and path.name not in read)
    change = changed_file(folder, {"files": read}) or (f"{added[0]} was added later" if added else None)
    if change:
        return Check("files", False, f"not as they were saved: {change}")
    return Check("files", True, f"{len(read)} files have the size and checksum of {COMPLETE}")


def check_saved(
    folder: Path, tokenizer: PreTrainedTokenizerBase, base: str | Path, manifest: Manifest | None
) -> list[Check]:
    """The configuration, the end token and the tokenizer.

    Args:
        base: the folder or name of the model with the configuration: the checkpoint's own, or that of an adapter.
        manifest: of the shards that it was trained on, where they are at hand.
    """
    run = run_of(folder)
    return [_configuration(base, run), _end_token(folder, tokenizer, run), _tokenizer(tokenizer, manifest)]


def _is_read(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in (*WEIGHTS, *TOKENIZER, *CONFIGS))


def _tokenizer(tokenizer: PreTrainedTokenizerBase, manifest: Manifest | None) -> Check:
    if manifest is None:
        return Check("tokenizer", None, "no shards of a pretraining run here that say what it was")
    made_with, given = manifest.settings["tokenizer"], tokenizer_fingerprint(tokenizer)
    if made_with != given:
        return Check("tokenizer", False, f"the shards were made with another one ({made_with}, not {given})")
    return Check("tokenizer", True, f"the one that {manifest.place} was made with ({given})")


def _configuration(base: str | Path, run: Run | None) -> Check:
    wanted = run.record["model"]["config"] if run else {}
    if not wanted:
        return Check("configuration", None, "no run's log here that says what it was")
    assert run is not None
    reader = GPT2Config if run.kind == PRETRAINING else AutoConfig
    try:
        found = json.loads(json.dumps(reader.from_pretrained(base, trust_remote_code=False).to_dict()))
    except (OSError, ValueError) as error:
        return Check("configuration", False, f"it does not load: {reason(error)}")
    compared = wanted.keys() - NO_DIFFERENCE - {"quantization_config", "architectures"}
    for key in sorted(compared):
        if found.get(key) != wanted[key]:
            return Check("configuration", False, f"{key} is {found.get(key)!r}, and was {wanted[key]!r} in training")
    return Check("configuration", True, f"{len(compared)} values are those of the run's log")


def _end_token(folder: Path, tokenizer: PreTrainedTokenizerBase, run: Run | None) -> Check:
    found: dict[str, list] = {}
    with suppress(OSError):  # an adapter's folder has no config.json
        if not (folder / ADAPTER_CONFIG_NAME).exists():
            found[CONFIG_NAME] = _ids(AutoConfig.from_pretrained(folder, trust_remote_code=False).eos_token_id)
    with suppress(OSError):
        found[GENERATION_CONFIG_NAME] = _ids(GenerationConfig.from_pretrained(folder).eos_token_id)
    end = tokenizer.eos_token_id
    was = _ids(run.record["model"]["config"].get("eos_token_id")) if run and run.kind == PRETRAINING else [end]
    if was != [end]:
        return Check("end token", False, f"the tokenizer ends a text with {end}, and it was {was} in training")
    for name, ids in found.items():
        if end not in ids:
            names = ", ".join(map(str, ids)) or "no token"
            return Check("end token", False, f"{name} ends a text with {names}, and the tokenizer with {end}")
    return Check("end token", True, f"{tokenizer.eos_token} ({end}) in {', '.join(['the tokenizer', *found])}")


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def find_shards(folder: Path, data_dir: str | None) -> Manifest | None:
    """The manifest of the shards that a checkpoint was pretrained on; None where they are not at hand.

    Args:
        data_dir: where they are now, if they have moved.

    Raises:
        UserError: nothing of the kind in `data_dir`.
    """
    run = run_of(folder)
    if run is None or run.kind != PRETRAINING:
        return None
    data = run.record["data"]
    if data_dir is None and not (Path(data.get("directory") or "") / MANIFEST).is_file():
        return None
    manifest = manifest_of_run(load_manifest(data_dir or data["directory"]), data)
    if manifest.fingerprint != data["fingerprint"]:
        raise UserError(
            f"{manifest.place} holds other data than {folder} was trained with: give --data_dir, where that is"
        )
    return manifest


@torch.no_grad()
def check_loss(folder: Path, model: PreTrainedModel, manifest: Manifest | None) -> Check:
    """The loss on the validation shards of the run, measured again, beside the one that the run logged at that step.

    Args:
        model: ours, in float32.
    """
    run = run_of(folder)
    if run is None or manifest is None:
        return Check("validation loss", None, "not measured: the shards of a pretraining run are not at hand")
    evaluation = run.evaluations[-1] if run.evaluations else {"step": -1}
    if evaluation["step"] != (step := run.log[-1]["step"]):
        return Check("validation loss", None, f"not measured: the run logged none at step {step:,}")
    windows = TokenWindows(manifest, "validation", run.record["data"]["block_size"])
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    found = evaluate_windows(accelerator.prepare_model(model, evaluation_mode=True), windows, 8, accelerator)["loss"]
    bound = evaluation["eval_loss"] * rounding(model.config, _dtype_of_evaluation(run))
    same = bool(abs(found - evaluation["eval_loss"]) <= bound)
    text = f"{found:.6f}, and {evaluation['eval_loss']:.6f} in the run's log (rounding: up to {bound:.1g})"
    return Check("validation loss", same, text)


def _dtype_of_evaluation(run: Run) -> str:
    arguments = run.record["defaults"] | run.record["arguments"]
    if arguments.get("bf16"):
        return "bfloat16"
    return "float16" if arguments.get("fp16") or arguments.get("tf32") else "float32"  # as TF32's mantissa
