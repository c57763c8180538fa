"""Where the text of a pretraining run comes from."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from llmkit.errors import UserError
from llmkit.paths import check_names, expand_homes

MIN_VOCAB_SIZE = 256 + 1  # of a byte-level BPE: every byte, and the end of text
MAX_VOCAB_SIZE = 1 << 20  # four times the largest vocabulary in use; training one takes memory for each token
REMOTE_GROUP = 4  # shards at a URL whose windows are shuffled together: 400 million tokens as they are prepared
# What belongs to a source of text: a recipe's prompts are beginnings of such text.
SOURCE = ("text_files", "dataset_name", "dataset_config", "dataset_split", "text_column", "streaming", "data_dir")
SOURCE += ("data", "sample_prompts")
# What a source of a mixture may say, besides its weight and its name; what is left is common to all of them.
OF_ONE_SOURCE = {name: bool if name == "streaming" else str for name in SOURCE[1:-2]} | {"text_files": list}
COMMON = ("tokenizer", "validation_fraction", "validation_split", "shard_group", "shard_cache_gb")


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens. With no source given: the standard library's own code."""

    # A source on the command line takes the place of the one in the recipe's file, with all that belongs to it.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_files": SOURCE,
        "dataset_name": SOURCE,
        "data": SOURCE,
    }

    text_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files of text, .jsonl or .parquet: paths, folders, globs such as 'books/*.txt', or URLs "
            "(https://, s3://, gs://)."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or a local folder."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "The dataset's configuration, such as sample-10BT."}
    )
    dataset_split: str = field(default="train", metadata={"help": "The split of the dataset that is tokenized."})
    text_column: str = field(
        default="text", metadata={"help": "The column of a dataset, .jsonl or .parquet file that holds the text."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset while it downloads."})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several sources in place of one: for each its weight, its name, and its text_files or "
            "dataset_name with what belongs to it; on the command line as JSON."
        },
    )
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "'bpe' or 'character': trained on the text. Otherwise the folder of an existing tokenizer, or its "
            "name on the Hub."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Number of tokens of a 'bpe' tokenizer that is trained."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for tokenizer and shards. By default a folder in data/, named by its content. Or the URL "
            "(https://, hf://, s3://) of a folder with prepared shards, in place of a text."
        },
    )
    prepare: Literal["first", "ahead"] = field(
        default="first",
        metadata={
            "help": "Tokenize all of the text first ('first'), or begin to train when the first shards are whole "
            "('ahead')."
        },
    )
    shard_group: int | None = field(
        default=None,
        metadata={
            "help": "Shuffle the windows of this many consecutive shards together. The default is all shards, or 4 if "
            "the shards are at a URL."
        },
    )
    shard_cache_gb: float = field(
        default=10.0,
        metadata={"help": "The most that the shards of URLs take on this machine's disk, in gigabytes (10^9 bytes)."},
    )
    validation_fraction: float = field(default=0.01, metadata={"help": "Fraction of the text that is held out."})
    validation_split: Literal["document", "tail"] = field(
        default="document",
        metadata={
            "help": "Hold out whole documents, or the end of each where there are too few ('document'); or always the "
            "end of each ('tail')."
        },
    )

    def __post_init__(self):
        expand_homes(self, "data_dir")
        check_names(self, "dataset_name", "tokenizer")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction}: it lies between 0 and 1, such as 0.01")
        if self.text_files and self.dataset_name:
            raise UserError("text_files and dataset_name are both set: set one of them")
        if self.shards_url and (self.text_files or self.dataset_name or self.prepare == "ahead"):
            raise UserError(
                f"data_dir={self.data_dir}: a URL has finished shards: leave out text_files, dataset_name and prepare"
            )
        if self.shards_url and any(character in self.shards_url for character in "?#"):
            raise UserError(f"data_dir={self.data_dir}: give the URL of a folder, without ? and #")
        if not self.shard_cache_gb > 0:
            raise UserError(f"shard_cache_gb={self.shard_cache_gb}: give gigabytes for the shards of URLs, such as 10")
        if self.shard_group is not None and self.shard_group < 1:
            raise UserError(f"shard_group={self.shard_group}: give 1 or more shards, or leave it out")
        if self.tokenizer == "bpe":
            check_vocab_size(self.vocab_size)
        self.sources()

    @property
    def shards_url(self) -> str | None:
        """`data_dir`, where it is a URL."""
        return self.data_dir if self.data_dir and "://" in self.data_dir else None

    def sources(self) -> list["Source"]:
        """The sources of a mixture, in the order of `data`; none where there is one source alone.

        Raises:
            UserError: `data` is not what it has to be.
        """
        if self.data is None:
            return []
        if self.text_files or self.dataset_name or self.data_dir:
            raise UserError("data names several sources: give text_files, dataset_name and data_dir within them")
        if self.prepare == "ahead":
            raise UserError("prepare: ahead is for one source, and data names several: leave it out")
        if self.tokenizer in ("bpe", "character"):
            raise UserError(
                f"data: tokenizer={self.tokenizer} is trained on one source, and several need the same tokenizer: "
                "give the folder of one (llmkit tokenizer train makes it), or a name on the Hub"
            )
        sources = [self._source(number, given) for number, given in enumerate(self.data, 1)]
        if len({source.name for source in sources}) < len(sources):
            raise UserError(f"data: names {[source.name for source in sources]}: give each source a name of its own")
        for step in {step for source in sources for step in source.weights}:
            if not any(source.weight_at(step) for source in sources):
                raise UserError(f"data: all weights are 0 after {step:,} steps: give one of the sources a weight")
        return sources

    def _source(self, number: int, given: Any) -> "Source":
        try:
            said = dict(json.loads(given) if isinstance(given, str) else given)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"data: source {number} is {str(given)[:60]!r}: give keys and values, such as "
                '{"weight": 0.7, "text_files": "books/*.txt"}'
            ) from error
        weights, name = _weights(said.pop("weight", None), number), said.pop("name", None)
        if isinstance(said.get("text_files"), str):
            said["text_files"] = [said["text_files"]]
        for key, value in said.items():
            if key not in OF_ONE_SOURCE:
                raise UserError(
                    f"data: source {number} has an unknown key {key}: choose from weight, name, "
                    f"{', '.join(OF_ONE_SOURCE)}; what is common to all sources stands outside"
                )
            if not isinstance(value, OF_ONE_SOURCE[key]):
                raise UserError(f"data: source {number}: {key} is {value!r}: give a {OF_ONE_SOURCE[key].__name__}")
        if not (said.get("text_files") or said.get("dataset_name") or "://" in said.get("data_dir", "")):
            raise UserError(
                f"data: source {number} has no text: give it text_files, dataset_name or a URL as data_dir"
            )
        common = {name: getattr(self, name) for name in COMMON}
        name = name or str(said.get("dataset_name", number)).rstrip("/").split("/")[-1]
        return Source(str(name), weights, DataArguments(**common, **said))


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        name: in logs and reports.
        weights: its weight after so many steps, from 0 on.
        args: its text.
    """

    name: str
    weights: Mapping[int, float]
    args: DataArguments

    def weight_at(self, step: int) -> float:
        """Its weight in the step after `step` steps."""
        return self.weights[max(begin for begin in self.weights if begin <= step)]


def _weights(given: Any, number: int) -> dict[int, float]:
    changes = given if isinstance(given, dict) else {0: given}
    try:
        weights = {int(step): float(weight) for step, weight in changes.items()}
    except (ValueError, TypeError):
        weights = {}
    if 0 not in weights or min(weights) < 0 or not all(0 <= weight < math.inf for weight in weights.values()):
        raise UserError(
            f"data: source {number} has the weight {given!r}: give a number, or one for each step at which it "
            "changes, from 0 on, such as {0: 0.7, 5000: 0.4}"
        )
    return weights


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError for a size that no byte-level BPE has."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}: a byte-level BPE has from {MIN_VOCAB_SIZE} (256 bytes and an end of text) "
            f"to {MAX_VOCAB_SIZE:,} tokens"
        )
