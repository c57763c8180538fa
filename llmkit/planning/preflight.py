"""Does this recipe train right on this machine? Some of its steps are taken on little text, in about a minute."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
from transformers import PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from llmkit.data.arguments import DataArguments
from llmkit.data.manifest import SPLITS, Manifest, Shard, Split
from llmkit.data.tokenizer import load_tokenizer, train_character_tokenizer
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.files import checksum
from llmkit.finetuning.adapters import check_run, load_base_config, load_base_model, load_chat_tokenizer
from llmkit.finetuning.conversations import Conversations, encode_all, load_conversations
from llmkit.finetuning.preference_trainer import PreferenceTrainer
from llmkit.finetuning.preferences import encode_pairs, load_pairs
from llmkit.finetuning.sft_trainer import ConversationTrainer
from llmkit.hub_access import is_here
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.planning.doctor import ERROR, WARNING, Finding
from llmkit.planning.pretraining import prepared_shards, vocabulary_size
from llmkit.planning.training_checks import Make, Start, examine_training
from llmkit.recipe_kinds import DPO, PRETRAIN, RecipeKind
from llmkit.training.pretrain_trainer import PretrainTrainer

WINDOWS = 64  # of the recipe's text
ROWS = 256  # conversations or pairs
# Tokens: on a CPU windows and conversations are this short, so that a minute is enough.
CPU_BLOCK = 32
CPU_LENGTH = 128

Source = TypeVar("Source", bound=Conversations)
Parts = tuple[Make, PreTrainedModel, Start, int | None]  # what `examine_training` takes beside the arguments


def preflight(kind: RecipeKind, recipe: tuple) -> Iterator[Finding]:
    """The checks of a recipe on the first of its data; nothing is downloaded.

    A pretraining recipe whose shards are not prepared yet is tried on random tokens. A recipe of the other kinds is
    not tried until its base and its dataset are on this machine.

    Args:
        kind: of the recipe.
        recipe: its filled dataclasses.
    """
    disable_progress_bar()  # of transformers' writing
    datasets.disable_progress_bars()
    args = recipe[-1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            if kind is PRETRAIN:
                make, model, start, block_size = _pretraining(Path(folder), *recipe)
            elif absent := _not_here(kind, recipe):
                name, download = absent
                fix = f"{download}, or begin the run, which does it"
                yield Finding("preflight", WARNING, f"not made: {name} is not on this machine", fix)
                return
            else:
                make, model, start, block_size = _fine_tuning(kind, *recipe)
        except UserError as error:
            yield Finding("preflight", ERROR, str(error))
            return
        yield from examine_training(make, model, args, start, block_size)


def _not_here(kind: RecipeKind, recipe: tuple) -> tuple[str, str] | None:
    """The first of a fine-tuning recipe's repositories that would be downloaded, and the command that does it."""
    data, model, _ = recipe
    if data.dataset_name and not is_here(data.dataset_name, "dataset"):
        return data.dataset_name, f"hf download {data.dataset_name} --repo-type dataset"
    if kind is DPO and model.adapter and not is_here(model.adapter, "model"):
        return model.adapter, f"hf download {model.adapter}"
    if kind is DPO:
        model.resolve()  # the adapter says which base it is for
    return None if is_here(model.model, "model") else (model.model, f"hf download {model.model}")


def _pretraining(folder: Path, data_args: DataArguments, model_args, args) -> Parts:
    config = model_args.config()
    config.vocab_size = vocabulary_size(data_args, config)
    block_size = model_args.block_size or config.n_positions
    if args.device.type == "cpu":
        block_size = min(block_size, CPU_BLOCK)
    windows = _some_windows(folder, data_args, config.vocab_size, block_size)
    if model_args.init_from:
        model = model_args.model(load_tokenizer(data_args.tokenizer), args.seed)
    else:
        set_seed(args.seed)
        model = GPT2LMHeadModel(config)
    tokenizer = train_character_tokenizer(["any"])  # it is saved, and does nothing else
    for config in (model.config, model.generation_config):  # which Trainer would change, and say so
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    make = partial(PretrainTrainer, train_dataset=windows, eval_dataset=windows, processing_class=tokenizer)
    return make, model, "trained weights" if model_args.init_from else "new weights", block_size


def _fine_tuning(kind: RecipeKind, data_args, model_args, args) -> Parts:
    if args.device.type == "cpu":
        args.max_length = min(args.max_length, CPU_LENGTH)
    if kind is DPO:
        args.length_prompts = 0  # nothing is generated
    check_run(args, load_base_config(model_args), args.max_length)
    model = load_base_model(model_args, args.compute_dtype, args.device)
    return (_preferences if kind is DPO else _conversations)(data_args, model_args, model)


def _conversations(data_args, adapter_args, model) -> Parts:
    tokenizer = load_chat_tokenizer(adapter_args)
    rows = encode_all(_first_rows(load_conversations(data_args)), tokenizer)
    how = {"tokenizer": tokenizer, "description": "some conversations", "lora_config": adapter_args.lora_config(model)}
    return partial(ConversationTrainer, train_rows=rows, eval_rows=rows, **how), model, "trained weights", None


def _preferences(data_args, model_args, model) -> Parts:
    tokenizer = model_args.load_tokenizer()
    rows = encode_pairs(_first_rows(load_pairs(data_args)), tokenizer)
    how = {"tokenizer": tokenizer, "description": "some pairs"}
    how["lora_config"] = None if model_args.adapter else model_args.lora_config(model)
    model = model_args.put_adapter(model) if model_args.adapter else model
    return partial(PreferenceTrainer, train_rows=rows, eval_rows=rows, **how), model, "reference", None


def _first_rows(loaded: tuple[Source, Source]) -> Source:
    train, _ = loaded
    train.rows = train.rows[:ROWS]
    return train


def _some_windows(folder: Path, data_args: DataArguments, vocab_size: int, block_size: int) -> TokenWindows:
    """Windows over the first of the recipe's prepared text, or over random tokens where it is not on this machine."""
    prepared = prepared_shards(data_args)
    if prepared and prepared.url is None:
        text = TokenWindows(prepared, "train", block_size)
        ids = np.concatenate([text[number]["input_ids"] for number in range(min(WINDOWS, len(text)))])
    else:
        ids = np.random.default_rng(0).integers(0, vocab_size, WINDOWS * block_size)
    ids = np.append(ids, ids[:1]).astype(np.uint32)
    ids.tofile(folder / "some.bin")
    shard = Shard("some.bin", len(ids), documents=1, bytes=len(ids), xxh3_64=checksum(folder / "some.bin"))
    manifest = Manifest(
        directory=folder,
        dtype="uint32",
        vocab_size=vocab_size,
        eos_token_id=0,
        corpus="some windows",
        settings={"corpus": "some windows", "tokenizer": "the recipe's"},
        splits=dict.fromkeys(SPLITS, Split.of([shard])),
    )
    return TokenWindows(manifest, "train", block_size)
