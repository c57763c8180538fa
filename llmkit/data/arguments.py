"""Where the text of a pretraining run comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llmkit.errors import UserError
from llmkit.paths import check_names, expand_homes

MIN_VOCAB_SIZE = 256 + 1  # of a byte-level BPE: every byte, and the end of text
MAX_VOCAB_SIZE = 1 << 20  # four times the largest vocabulary in use; training one takes memory for each token
# What belongs to a source of text: a recipe's prompts are beginnings of such text.
SOURCE = ("text_files", "dataset_name", "dataset_config", "dataset_split", "text_column", "streaming", "data_dir")
SOURCE += ("sample_prompts",)


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens. With no source given: the standard library's own code."""

    # A source on the command line takes the place of the one in the recipe's file, with all that belongs to it.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_files": SOURCE, "dataset_name": SOURCE}

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
        metadata={"help": "Folder for tokenizer and shards. By default a folder in data/, named by its content."},
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
        if self.tokenizer == "bpe":
            check_vocab_size(self.vocab_size)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError for a size that no byte-level BPE has."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}: a byte-level BPE has from {MIN_VOCAB_SIZE} (256 bytes and an end of text) "
            f"to {MAX_VOCAB_SIZE:,} tokens"
        )
