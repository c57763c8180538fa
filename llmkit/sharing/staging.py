"""What of a checkpoint is shared: nothing that nobody could load, and nothing private."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from llmkit.errors import UserError
from llmkit.paths import WHOLE_PATH, last_name
from llmkit.runs.run import QUANTIZATION_CONFIG, Run

CONFIGS = (CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME, QUANTIZATION_CONFIG, "tokenizer_config.json")
LOCAL = ("_name_or_path", "name_or_path", "is_local", "local_files_only")  # where a model or a tokenizer came from
PATH_KEYS = ("_file", "_dir", "_path", "_folder")  # whose relative paths are private as well
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*")
TOKENIZER += ("merges.txt", "tokenizer.model", "spiece.model", "chat_template.*")


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a folder that nobody could load a language model from.

    Raises:
        UserError: no folder, no whole weights, no causal language model, no tokenizer.
    """
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is no folder: give a checkpoint's")
    weights = [path for pattern in WEIGHTS for path in checkpoint.glob(pattern)]
    if not weights:
        inner = max(checkpoint.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
        hint = f"push a checkpoint within it, such as {inner}" if inner else "give the folder of a saved model"
        raise UserError(f"{checkpoint} holds no weights in safetensors files: {hint}")
    for path in weights:
        try:
            named = _read(path)["weight_map"].values() if path.suffix == ".json" else []
            if missing := set(named) - {path.name for path in weights}:
                raise UserError(f"{path} names {min(missing)}, which is not there: save the model again")
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): save the model again") from error
    if (checkpoint / ADAPTER_CONFIG_NAME).exists():
        adapter = _read(checkpoint / ADAPTER_CONFIG_NAME)
        for key in ("peft_type", "base_model_name_or_path"):
            if not isinstance(adapter.get(key), str):
                raise UserError(f"{checkpoint}: its {ADAPTER_CONFIG_NAME} is damaged, without {key}: save it again")
    else:
        if not (checkpoint / CONFIG_NAME).exists():
            raise UserError(f"{checkpoint} has neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}: it is no checkpoint")
        config = _read(checkpoint / CONFIG_NAME)
        architectures = config.get("architectures")
        is_named = isinstance(architectures, list) and architectures
        architecture = architectures[0] if is_named else "model of no named architecture"
        if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise UserError(f"{checkpoint} holds a {architecture}: only causal language models are pushed")
        if config.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise UserError(
                f"{checkpoint} has model_type {config.get('model_type')}, which transformers does not know"
            )
    if not (checkpoint / "tokenizer_config.json").exists():
        raise UserError(f"{checkpoint} has no tokenizer: save the one it was trained with there")


def stage(checkpoint: Path, folder: Path) -> None:
    """Put into an empty folder what is pushed: links to a checkpoint's files, and its configs without local paths.

    Not among it are the optimizer's state, logs, and Trainer's pickled arguments.
    """
    for pattern in (*WEIGHTS, *TOKENIZER):
        for path in checkpoint.glob(pattern):
            try:
                os.link(path, folder / path.name)  # outlives the rotation of checkpoints
            except OSError:
                (folder / path.name).symlink_to(path.absolute())  # another file system
    for name in CONFIGS:
        if (checkpoint / name).exists():
            _write(folder / name, _without_paths(_read(checkpoint / name)))


def _without_paths(value: object, key: str = "") -> object:
    """A configuration without where its files lay: paths become their last name, at any depth.

    Texts of tokens and templates stay as they are; an adapter's base is for `base_on_hub` to check.
    """
    if isinstance(value, dict):
        # Nor with the names of code, which is not pushed.
        kept = {name: part for name, part in value.items() if name not in (*LOCAL, "auto_map")}
        return {name: _without_paths(part, name) for name, part in kept.items()}
    if isinstance(value, list):
        return [_without_paths(part, key) for part in value]
    is_text = key == "content" or key.endswith(("_token", "_tokens", "chat_template", "base_model_name_or_path"))
    is_path = isinstance(value, str) and not is_text and (WHOLE_PATH.fullmatch(value) or key.endswith(PATH_KEYS))
    return last_name(value) if is_path else value


def base_on_hub(folder: Path, given: str | None, run: Run | None, is_on_hub: Callable[[str], bool]) -> str | None:
    """The name on the Hub of the model that training started from, which a staged adapter's config then has.

    Args:
        folder: with the staged files.
        given: the name to take, in place of the local folder that it was.

    Raises:
        UserError: an adapter's base is a local folder, or the base that is given is not on the Hub.
    """
    config = folder / ADAPTER_CONFIG_NAME
    adapter = _read(config) if config.exists() else None
    source = run.record["source"] if run else {}
    started_from = adapter["base_model_name_or_path"] if adapter else source.get("init_from")
    base = given or started_from
    # `me/base` may be a folder beside the one that training was started in: only a commit shows that it is not.
    if adapter and not given and not adapter.get("revision") and not Path(base or "").is_absolute():
        raise UserError(
            f"the adapter's base {base} may be a folder or a name on the Hub, for its configuration has no commit of "
            f"it: say which model on the Hub it is, such as --base {base}"
        )
    found = base is not None and not Path(base).is_dir() and is_on_hub(base)
    if given and not found:
        raise UserError(f"--base {base} is not a model on the Hub: push it first (`llmkit push FOLDER {base}`)")
    if adapter and not found:
        raise UserError(
            f"the adapter's base {base} is not a model on the Hub, so nobody else could load it: push the base first "
            "(`llmkit push FOLDER me/base`) and then this with --base me/base; or `llmkit merge` it and push that"
        )
    if adapter and base != adapter["base_model_name_or_path"]:
        _write(config, adapter | {"base_model_name_or_path": base, "revision": None})
    return base if found else None


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): save the model again") from error
    return content


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
