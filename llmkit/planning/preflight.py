"""Does this recipe train right on this machine? Some of its steps are taken on little text, in about a minute."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from llmkit.data.arguments import DataArguments
from llmkit.data.manifest import SPLITS, Manifest, Shard, Split
from llmkit.data.tokenizer import load_tokenizer, train_character_tokenizer
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.files import checksum
from llmkit.model.modeling_gpt2 import GPT2LMHeadModel
from llmkit.planning.doctor import ERROR, Finding
from llmkit.planning.pretraining import prepared_shards, vocabulary_size
from llmkit.planning.training_checks import examine_training
from llmkit.recipe_kinds import PRETRAIN, RecipeKind
from llmkit.training.pretrain_trainer import PretrainTrainer

WINDOWS = 64  # of the recipe's text
CPU_BLOCK = 32  # tokens: on a CPU the windows are this short, so that a minute is enough


def preflight(kind: RecipeKind, recipe: tuple) -> Iterator[Finding]:
    """The checks of a pretraining recipe, on the first text of its shards, or on random tokens where there are none.

    Args:
        kind: of the recipe; for the others there is nothing yet.
        recipe: its filled dataclasses.
    """
    if kind is not PRETRAIN:
        return
    disable_progress_bar()  # of transformers' writing
    data_args, model_args, args = recipe
    config = model_args.config()
    config.vocab_size = vocabulary_size(data_args, config)
    block_size = model_args.block_size or config.n_positions
    if args.device.type == "cpu":
        block_size = min(block_size, CPU_BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        try:
            windows = _some_windows(Path(folder), data_args, config.vocab_size, block_size)
            if model_args.init_from:
                model = model_args.model(load_tokenizer(data_args.tokenizer), args.seed)
            else:
                set_seed(args.seed)
                model = GPT2LMHeadModel(config)
        except UserError as error:
            yield Finding("preflight", ERROR, str(error))
            return
        tokenizer = train_character_tokenizer(["any"])  # it is saved, and does nothing else
        for config in (model.config, model.generation_config):  # which Trainer would change, and say so
            config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        data = {"train_dataset": windows, "eval_dataset": windows, "processing_class": tokenizer}
        make = partial(PretrainTrainer, **data)
        yield from examine_training(make, model, args, block_size, trained=model_args.init_from is not None)


def _some_windows(folder: Path, data_args: DataArguments, vocab_size: int, block_size: int) -> TokenWindows:
    """Windows over the first of the recipe's prepared text, or over random tokens."""
    if prepared := prepared_shards(data_args):
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
