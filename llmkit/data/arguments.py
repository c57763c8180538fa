"""Where the text of a pretraining run comes from."""

from dataclasses import dataclass, field
from typing import Literal

from llmkit.errors import UserError


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens. With no source given: the standard library's own code."""

    text_files: list[str] | None = field(
        default=None, metadata={"help": "Paths or globs of text, .jsonl or .parquet files, e.g. 'books/*.txt'."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration, if it has any."})
    dataset_split: str = field(default="train", metadata={"help": "The split that is tokenized."})
    text_column: str = field(default="text", metadata={"help": "The column of a dataset that holds the text."})
    streaming: bool = field(default=False, metadata={"help": "Read the dataset while downloading it."})
    tokenizer: str = field(
        default="bpe",
        metadata={"help": "'bpe' or 'character': trained on the text. Else the name or folder of an existing one."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of a 'bpe' tokenizer that is trained."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Where tokenizer and shards are kept; by default a folder in data/ named by its content."},
    )
    validation_fraction: float = field(default=0.01, metadata={"help": "Fraction of the text held out."})
    validation_split: Literal["document", "tail"] = field(
        default="document", metadata={"help": "Hold out whole documents, or the end of each ('tail')."}
    )

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction}: it lies between 0 and 1, such as 0.01")
        if self.text_files and self.dataset_name:
            raise UserError("text_files and dataset_name are both set: set one of them")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise UserError(
                f"vocab_size={self.vocab_size}: a byte-level BPE has 256 bytes and an end, so at least 257"
            )
