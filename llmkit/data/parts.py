"""A preparation of token shards in several tasks: each makes the shards of its part of the corpus, the last merges.

    shards/parts/plan.json          what the tasks have to agree on
    shards/parts/00000/             the shards of the first part, and `part.json` when it is whole
    shards/train_00000.bin ...      after the merge, the parts' shards in the order of the tasks

The parts are consecutive stretches of the corpus, so the documents come in the order in which one process writes them,
and each is held out or not by its hash alone. What the shards hold depends on the number of tasks, because each task
closes its last shards, and on nothing else: not on where tasks run, how many at a time, or in what order they end.

A task that was killed goes on after its last full shard, as a preparation by one process does. How the tasks are run
is the business of `executors.py`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmkit.data.corpus import Corpus
from llmkit.data.encoding import token_dtype
from llmkit.data.manifest import JOURNAL, MANIFEST, PARTS, SPLITS, Manifest, Shard, load_manifest
from llmkit.data.preparation import Preparation, check_settings
from llmkit.data.shards import (
    check_disk,
    check_splits,
    full_disk_is_user_error,
    hold_out_whole,
    save_manifest,
    working_alone,
)
from llmkit.errors import UserError
from llmkit.files import write_json

PLAN, PART = "plan.json", "part.json"


class Parts:
    """The tasks of one preparation. A task needs nothing but this object, which can be sent to another machine.

    Args:
        corpus, tokenizer: what is tokenized, and with what.
        directory: the folder for the shards, which all tasks see under the same path.
        settings: of the shards (`shard_settings`).
        tasks: into how many parts the corpus is divided.
        num_workers: threads of each task.

    Raises:
        UserError: the corpus cannot be divided so often, the disk is too small, or the folder holds the parts of
            another preparation.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        settings: dict,
        tasks: int,
        num_workers: int = 1,
    ):
        self.corpora = corpus.divided(tasks)
        self.corpus, self.tokenizer, self.directory = corpus, tokenizer, directory.absolute()
        self.settings, self.num_workers = settings, num_workers
        if (directory / JOURNAL).exists():
            raise UserError(
                f"{directory}: its preparation by one process did not finish: give its command again, without "
                "--executor, or delete the folder"
            )
        plan = self._plan_file()
        if not plan.exists():
            check_disk(corpus, corpus.num_bytes(), tokenizer, directory, done=0)
        # The whole corpus decides it: a part may have too few documents to tell.
        self.plan = settings | {"tasks": tasks, "whole_documents": hold_out_whole(corpus, settings)}
        if plan.exists():
            check_settings(directory, _read(plan), self.plan)
        else:
            plan.parent.mkdir(parents=True, exist_ok=True)
            write_json(plan, self.plan)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.corpus.description}, {len(self.corpora)} tasks)"

    def _plan_file(self) -> Path:
        return self.directory / PARTS / PLAN

    def folder(self, task: int) -> Path:
        """Where a task writes."""
        return self.directory / PARTS / f"{task:05d}"

    def prepare(self, task: int) -> dict[str, list[Shard]]:
        """Do the work of a task, or what is left of it. Returns the shards of its part.

        Raises:
            UserError: text that cannot be read, a full disk, a folder that was made with other settings.
        """
        folder = self.folder(task)
        with working_alone(folder), full_disk_is_user_error(folder):
            if not (folder / PART).exists():
                settings = self.plan | {"task": task}
                with closing(Preparation(self.corpora[task], self.tokenizer, folder, settings)) as preparation:
                    preparation.write(self.plan["whole_documents"], self.num_workers, tqdm(disable=True))
                    shards = preparation.finish()
                part = {split: [asdict(shard) for shard in finished] for split, finished in shards.items()}
                write_json(folder / PART, {"settings": settings, "shards": part})
        return self._shards(task)

    def _shards(self, task: int) -> dict[str, list[Shard]]:
        part = _read(self.folder(task) / PART)
        try:
            check_settings(self.folder(task), part["settings"], self.plan | {"task": task})
            return {split: [Shard(**shard) for shard in part["shards"][split]] for split in SPLITS}
        except (TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise UserError(f"{self.folder(task) / PART} is damaged ({error}): delete {self.directory}") from error

    def merge(self) -> Manifest:
        """Check the parts of all tasks, and make one dataset of them. Killed in the middle, it can be done again.

        Raises:
            UserError: a task has not finished, a shard is missing or truncated, a split is empty.
        """
        with working_alone(self.directory):
            if not (self.directory / MANIFEST).exists():
                moves = list(self._moves())
                shards = {split: [shard for of, _, shard in moves if of == split] for split in SPLITS}
                check_splits(self.corpus, shards, self.settings["validation_fraction"])
                for _, source, shard in moves:
                    if source.exists():
                        source.replace(self.directory / shard.name)
                save_manifest(self.corpus, self.tokenizer, self.directory, self.settings, shards)
            shutil.rmtree(self.directory / PARTS, ignore_errors=True)
        return load_manifest(self.directory)

    def _moves(self) -> Iterator[tuple[str, Path, Shard]]:
        """Each shard's split, its file in the folder of its task, and what it is called in the end."""
        if missing := [task for task in range(len(self.corpora)) if not (self.folder(task) / PART).exists()]:
            raise UserError(
                f"{self.directory}: {len(missing):,} of {len(self.corpora):,} tasks have not finished (the first is "
                f"{missing[0]}): give the command again, and only these are run"
            )
        dtype, count = token_dtype(self.tokenizer), dict.fromkeys(SPLITS, 0)
        for task in range(len(self.corpora)):
            for split, shards in self._shards(task).items():
                for shard in shards:
                    source = self.folder(task) / shard.name
                    if source.exists():
                        shard.check_file(source.parent, dtype)
                    shard.name = f"{split}_{count[split]:05d}.bin"
                    count[split] += 1
                    if not source.exists():  # a merge that was killed has moved it
                        shard.check_file(self.directory, dtype)
                    yield split, source, shard


def _read(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete its folder and prepare the shards again") from error
