"""The arguments of a pretraining run: TrainingArguments and what is ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import TrainingArguments

from llmkit.errors import UserError
from llmkit.paths import expand_homes
from llmkit.training.batch_ramp import Batches
from llmkit.training.inherited_arguments import REFUSED
from llmkit.training.optimizers import MUON, OptimizerArguments, is_fully_sharded
from llmkit.training.run_arguments import RunArguments, device_type

_ONE_PASS = "to Trainer a run is one pass over its batches, so there is no end of an epoch: give steps"
_WINDOWS = "the batches are windows of one length, all full, in an order that follows from the seed"


@dataclass
# pyrefly: ignore[inconsistent-inheritance]  fields that are None until `__post_init__` chooses, or never None after it
class PretrainArguments(RunArguments, OptimizerArguments, TrainingArguments):
    """TrainingArguments with the batch stated in tokens, and with what the machine is good for chosen by itself."""

    REFUSED: ClassVar[Mapping[str, str]] = REFUSED | {
        "dataloader_drop_last": _WINDOWS,
        "dataloader_persistent_workers": "a run is one pass of its loader, whose workers live as long as it does",
        "gradient_accumulation_steps": "it is derived from total_batch_tokens",
        "train_sampling_strategy": _WINDOWS,
    }
    DECISIVE: ClassVar[set[str]] = {"total_batch_tokens", "batch_ramp_start", "batch_ramp_tokens"}
    METRICS: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte")

    total_batch_tokens: int = field(
        default=524_288, metadata={"help": "The tokens of a step over all ranks. The accumulation follows from it."}
    )
    batch_ramp_start: int | None = field(
        default=None, metadata={"help": "The batch of the first step, in tokens. It then grows to the full batch."}
    )
    batch_ramp_tokens: int | None = field(
        default=None,
        metadata={
            "help": "The number of tokens over which the batch grows linearly. max_steps still counts full batches."
        },
    )
    monitor_steps: int = field(
        default=0,
        metadata={"help": "The number of steps between two logs of gradient, weight and update norms. 0 means never."},
    )
    hellaswag_steps: int = field(
        default=0, metadata={"help": "The number of steps between two HellaSwag scores. 0 means never."}
    )
    hellaswag_file: str | None = field(
        default=None,
        metadata={"help": "A JSONL file of HellaSwag questions in the official format. The default is the Hub's."},
    )
    hellaswag_questions: int | None = field(
        default=None,
        metadata={
            "help": "The number of questions, from the first on. The default is all (10,042 in the official file)."
        },
    )
    sample_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts continued at each evaluation, to watch the model learn; a recipe without any "
            "takes the beginnings of held-out documents."
        },
    )
    sample_tokens: int = field(default=64, metadata={"help": "The longest sample, in tokens."})

    torch_compile: bool | None = field(
        default=None, metadata={"help": "Use torch.compile. The default is to use it on NVIDIA GPUs."}
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Saved in config.json for generation. Training makes no cache."}
    )

    def __post_init__(self):
        on_cuda = device_type(self) == "cuda"
        compiles = self.torch_compile_backend or self.torch_compile_mode
        if self.torch_compile is False and compiles:
            raise UserError(f"torch_compile: false, and {compiles} for torch.compile: set one of them")
        if self.torch_compile is None:
            self.torch_compile = on_cuda or bool(compiles)
            self.compiles_by_default = not compiles
        if self.accelerator_config is None and on_cuda:
            # From pinned memory: otherwise each batch waits for the GPU to finish what it has queued.
            self.accelerator_config = {"non_blocking": True}
        for name in ("eval_strategy", "logging_strategy", "save_strategy"):
            if getattr(self, name) == "epoch":
                raise UserError(f"{name}: epoch is not supported: {_ONE_PASS}")
        expand_homes(self, "hellaswag_file")
        super().__post_init__()
        if self.total_batch_tokens < 1:
            raise UserError(f"total_batch_tokens={self.total_batch_tokens}: must be at least 1")
        self._check_watching()
        if self.optim == MUON and self.lr_schedule == "one_cycle":
            raise UserError("lr_schedule: one_cycle cycles Adam's beta1, which Muon has not: take another schedule")
        if (self.batch_ramp_start is None) != (self.batch_ramp_tokens is None):
            raise UserError("batch_ramp_start and batch_ramp_tokens belong together: give both or none")
        if self.batch_ramp_tokens is not None and self.batch_ramp_tokens < 1:
            raise UserError(f"batch_ramp_tokens={self.batch_ramp_tokens}: must be at least 1")
        if self.batch_ramp_start is not None and self.lr_schedule == "one_cycle":
            raise UserError("lr_schedule: one_cycle counts steps of one size: leave out the batch ramp")

        if self.train_minutes is not None and (self.batch_ramp_start is not None or self.hellaswag_steps):
            name = "hellaswag_steps" if self.hellaswag_steps else "batch_ramp_start"
            raise UserError(f"train_minutes does not measure what {name} takes: leave it out, or give max_steps")

    def set_accumulation(self, block_size: int) -> None:
        """Derive `gradient_accumulation_steps` for windows of `block_size` tokens, and check the ramp with it."""
        self.gradient_accumulation_steps = self.accumulation(block_size, self.world_size)
        self._check_ramp(block_size)

    def accumulation(self, block_size: int, ranks: int) -> int:
        """The micro-batches of a step on each of `ranks` ranks, which follow from `total_batch_tokens`.

        Raises:
            UserError: they do not divide; the line proposes sizes that do.
        """
        total, batch_size = self.total_batch_tokens, self.per_device_train_batch_size
        micro = batch_size * block_size * ranks
        if total % micro == 0:
            return total // micro
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
        if self.hellaswag_file is not None and not Path(self.hellaswag_file).is_file():
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
