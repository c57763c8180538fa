"""What a recipe can be told."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torch_tf32_available

from llmkit.batch_ramp import Batches
from llmkit.configuration_gpt2 import GPT2Config
from llmkit.errors import UserError
from llmkit.hardware import bf16_is_fast, set_up_cpu
from llmkit.modeling_gpt2 import GPT2LMHeadModel
from llmkit.optimizers import OptimizerArguments, is_fully_sharded
from llmkit.schedules import ScheduleArguments


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


# A preset or a checkpoint on the command line takes the place of the shape that stands in the recipe's file.
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
REPLACES = {"preset": SHAPE, "init_from": SHAPE}


@dataclass
class ModelArguments:
    """The model's shape: a preset's, or its own where stated."""

    preset: str | None = field(default=None, metadata={"help": "124M, 355M, 774M, 1558M or gpt3-125M."})
    init_from: str | None = field(
        default=None, metadata={"help": "Start from this checkpoint's weights, e.g. openai-community/gpt2."}
    )
    block_size: int | None = field(default=None, metadata={"help": "Context length in tokens (n_positions)."})
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    dropout: float = field(default=0.0, metadata={"help": "For embeddings, attention weights and residuals."})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager, flex_attention or, where installed, flash_attention_2."}
    )

    def config(self) -> GPT2Config:
        """The model's configuration, but for the vocabulary: see `GPT2Config.for_tokenizer`.

        Raises:
            UserError: sizes that make no model, or a shape together with `init_from`.
        """
        shape = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "n_positions": self.block_size}
        shape = {key: value for key, value in shape.items() if value is not None}
        if bad := [f"{key}={value}" for key, value in shape.items() if value < 1]:
            raise UserError(f"{', '.join(bad)}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: it lies between 0 and 1")
        if self.attn_implementation not in (known := ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]):
            raise UserError(
                f"attn_implementation={self.attn_implementation}: choose one of {', '.join(sorted(known))}"
            )
        dropout = {"embd_pdrop": self.dropout, "attn_pdrop": self.dropout, "resid_pdrop": self.dropout}
        rest = {**dropout, "attn_implementation": self.attn_implementation}
        try:
            if self.init_from is None:
                return GPT2Config.from_preset(self.preset or "124M", **shape, **rest)
            if self.preset or shape.keys() - {"n_positions"}:
                raise UserError("init_from brings its own shape: leave out preset, n_layer, n_head and n_embd")
            config = GPT2Config.from_pretrained(self.init_from, **rest)
            if self.block_size and self.block_size > config.n_positions:
                raise UserError(f"block_size={self.block_size} is more than {self.init_from}'s {config.n_positions}")
            return config
        except StrictDataclassError as error:
            raise UserError(str(error.__cause__)) from error
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error

    def model(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> GPT2LMHeadModel:
        """A model with new weights, which the seed decides, or with those of `init_from`.

        Raises:
            UserError: a checkpoint that cannot be read, or has another vocabulary than the tokenizer.
        """
        config = self.config()
        set_seed(seed)
        try:
            if self.init_from is None:
                return GPT2LMHeadModel(config.for_tokenizer(tokenizer))
            if (config.vocab_size, config.eos_token_id) != (len(tokenizer), tokenizer.eos_token_id):
                raise UserError(
                    f"{self.init_from} has {config.vocab_size} tokens and ends with {config.eos_token_id}, the "
                    f"tokenizer {len(tokenizer)} and {tokenizer.eos_token_id}: give --tokenizer {self.init_from}"
                )
            return GPT2LMHeadModel.from_pretrained(self.init_from, config=config)
        except (ValueError, OSError, ImportError) as error:
            raise UserError(str(error)) from error


@dataclass
class PretrainArguments(ScheduleArguments, OptimizerArguments, TrainingArguments):
    """TrainingArguments with the batch stated in tokens, and with what the machine is good for chosen by itself."""

    total_batch_tokens: int = field(
        default=524_288, metadata={"help": "Tokens per step over all ranks; accumulation is derived."}
    )
    batch_ramp_start: int | None = field(
        default=None, metadata={"help": "Tokens of the first step's batch, which then grows to the full one."}
    )
    batch_ramp_tokens: int | None = field(
        default=None, metadata={"help": "Tokens over which it grows, linearly; max_steps still counts full batches."}
    )
    monitor_steps: int = field(
        default=0, metadata={"help": "Log norms of gradients, weights and updates every so many steps; 0: never."}
    )
    hellaswag_steps: int = field(default=0, metadata={"help": "Score HellaSwag every so many steps; 0: never."})
    hellaswag_file: str | None = field(
        default=None, metadata={"help": "Its questions, a JSONL file as the official one; default: from the Hub."}
    )
    hellaswag_questions: int | None = field(
        default=None, metadata={"help": "Take the first so many questions; default: all, 10,042 in the official one."}
    )
    sample_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts continued at each evaluation, to watch the model learn."}
    )
    sample_tokens: int = field(default=64, metadata={"help": "Length of those samples, in tokens."})

    # Chosen from the machine where not stated.
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; default: where it is fast."})
    torch_compile: bool | None = field(default=None, metadata={"help": "torch.compile; default: on NVIDIA GPUs."})

    # Other defaults than Trainer's, each for a reason.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses. Off: it costs a synchronisation a step, and hides NaN."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used in every step, so DDP need not look."}
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Saved in config.json for generation; training with targets makes no cache."}
    )

    def __post_init__(self):
        device_type = choose_precision(self)
        if self.torch_compile is None:
            self.torch_compile = device_type == "cuda"
        if self.accelerator_config is None and device_type == "cuda":
            # From pinned memory: otherwise each batch waits for the GPU to finish what it has queued.
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()
        use_one_gpu(self)
        batch_sizes = ("total_batch_tokens", "per_device_train_batch_size", "per_device_eval_batch_size")
        for name in (*batch_sizes, "sample_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_steps == 0 or (self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf):
            raise UserError("nothing to train: give max_steps of 1 or more, or num_train_epochs above 0")
        if not (self.learning_rate >= 0 and self.seed >= 0 and (self.data_seed or 0) >= 0):
            raise UserError("learning_rate, seed and data_seed cannot be negative")
        set_up_reporting(self.report_to)
        if self.gradient_accumulation_steps != 1:
            raise UserError("gradient_accumulation_steps is derived from total_batch_tokens: leave it out")
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor is not supported: the loss never makes the logits it smooths")
        self._check_watching()
        if (self.batch_ramp_start is None) != (self.batch_ramp_tokens is None):
            raise UserError("batch_ramp_start and batch_ramp_tokens belong together: give both or none")
        if self.batch_ramp_tokens is not None and self.batch_ramp_tokens < 1:
            raise UserError(f"batch_ramp_tokens={self.batch_ramp_tokens}: must be at least 1")
        if self.batch_ramp_start is not None and self.lr_schedule == "one_cycle":
            raise UserError("lr_schedule: one_cycle counts steps of one size: leave out the batch ramp")

    def set_accumulation(self, block_size: int) -> None:
        """Derive `gradient_accumulation_steps` from `total_batch_tokens` for windows of `block_size` tokens.

        Raises:
            UserError: they do not divide; the line proposes sizes that do.
        """
        total, batch_size, ranks = self.total_batch_tokens, self.per_device_train_batch_size, self.world_size
        micro = batch_size * block_size * ranks
        if total % micro == 0:
            self.gradient_accumulation_steps = total // micro
            self._check_ramp(block_size)
            return
        proposals = [n for n in (total // micro * micro, -(-total // micro) * micro) if n]
        text = f"take total_batch_tokens {' or '.join(map(str, proposals))}"
        if fitting := [size for size in range(1, batch_size) if total % (size * block_size * ranks) == 0]:
            text += f", or per_device_train_batch_size {fitting[-1]}"
        raise UserError(
            f"total_batch_tokens={total} is not a multiple of {micro}, which is {batch_size} windows of {block_size} "
            f"tokens on each of {ranks} rank(s): {text}"
        )

    def _check_watching(self) -> None:
        for name in ("monitor_steps", "hellaswag_steps"):
            steps = getattr(self, name)
            if steps < 0 or (steps and (self.logging_steps < 1 or steps % self.logging_steps)):
                raise UserError(f"{name}={steps}: give a multiple of logging_steps={self.logging_steps}, or 0")
        if self.monitor_steps and is_fully_sharded(self):
            raise UserError("monitor_steps needs whole parameters, and FSDP shards them: set it to 0")
        if self.hellaswag_questions is not None and self.hellaswag_questions < 1:
            raise UserError(f"hellaswag_questions={self.hellaswag_questions}: must be at least 1")
        if self.hellaswag_file is not None and not Path(self.hellaswag_file).expanduser().is_file():
            raise UserError(f"hellaswag_file={self.hellaswag_file}: no such file: give a JSONL file, or leave it out")
        if not self.hellaswag_steps and (self.hellaswag_file or self.hellaswag_questions):
            raise UserError("hellaswag_file and hellaswag_questions are for hellaswag_steps: give that as well")

    def _check_ramp(self, block_size: int) -> None:
        start, total = self.batch_ramp_start, self.total_batch_tokens
        unit = self.gradient_accumulation_steps * self.world_size * block_size
        if start is not None and (start % block_size or not unit <= start <= total):
            raise UserError(
                f"batch_ramp_start={start}: give a multiple of block_size={block_size} from {unit} (a window in each "
                f"of a step's micro-batches) to total_batch_tokens={total}, such as {-(-total // 16 // unit) * unit}"
            )

    def batches(self, block_size: int) -> Batches:
        """The run's micro-batches, in windows, once `max_steps` and the accumulation are set."""
        full = self.total_batch_tokens // block_size
        return Batches(
            full_steps=self.max_steps,
            full=full,
            micro_batches=self.gradient_accumulation_steps * self.world_size,
            start=(self.batch_ramp_start or self.total_batch_tokens) // block_size,
            ramp=(self.batch_ramp_tokens or 0) // block_size,
        )


def choose_precision(args: TrainingArguments) -> str:
    """Set what is not stated, `use_cpu`, `bf16` and `tf32`, from the machine, and set up its CPU if it trains on that.

    Returns:
        The type of the device that will be trained on.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    args.use_cpu = args.use_cpu or device.type == "cpu"
    device_type = "cpu" if args.use_cpu else device.type
    if args.bf16 is None:
        args.bf16 = not args.fp16 and bf16_is_fast(device_type)
    if args.tf32 is None and device_type == "cuda" and is_torch_tf32_available():
        args.tf32 = True
    if args.use_cpu:
        set_up_cpu()
    return device_type


def use_one_gpu(args: TrainingArguments) -> None:
    """Keep a process to its GPU: one that was started alone would get all of them, and Trainer its nn.DataParallel."""
    if args.n_gpu > 1:
        args._n_gpu = 1


def set_up_reporting(report_to: list[str]) -> None:
    """Refuse a logging service that is not there, before anything is written, and let wandb work without a login.

    Where nobody is logged in, wandb writes under ./wandb for a later `wandb sync`, in place of an error.
    """
    available = get_available_reporting_integrations()
    if missing := [name for name in report_to if name not in available]:
        raise UserError(f"report_to={missing[0]} is not installed here: choose from {', '.join(available)} and none")
    if "wandb" in report_to and "WANDB_MODE" not in os.environ:
        import wandb

        if not wandb.login(prompt=False, verify=False):
            os.environ["WANDB_MODE"] = "offline"
            wandb.teardown()  # it reads its environment once, and has just done so


def changed_arguments(arguments) -> dict:
    """The fields of a dataclass that differ from their defaults."""
    changed = {}
    for f in dataclasses.fields(arguments):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if (value := getattr(arguments, f.name)) != default:
            changed[f.name] = value
    return changed
