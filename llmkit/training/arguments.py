"""The arguments of a pretraining run: TrainingArguments and what is ours."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_tf32_available

from llmkit.errors import UserError
from llmkit.machine import bf16_is_fast, set_up_cpu
from llmkit.training.batch_ramp import Batches
from llmkit.training.compatibility import CheckpointingArguments
from llmkit.training.optimizers import OptimizerArguments, is_fully_sharded
from llmkit.training.reliability_arguments import ReliabilityArguments
from llmkit.training.schedules import ScheduleArguments


@dataclass
class PretrainArguments(
    ScheduleArguments, OptimizerArguments, ReliabilityArguments, CheckpointingArguments, TrainingArguments
):
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
        default_factory=list,
        metadata={
            "help": "Prompts continued at each evaluation, to watch the model learn; a recipe without any "
            "takes the beginnings of held-out documents."
        },
    )
    sample_tokens: int = field(default=64, metadata={"help": "Length of those samples, in tokens."})

    # Chosen from the machine where not stated.
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; default: where it is fast."})
    torch_compile: bool | None = field(default=None, metadata={"help": "torch.compile; default: on NVIDIA GPUs."})

    # Other defaults than Trainer's, each for a reason.
    logging_first_step: bool = field(
        default=True, metadata={"help": "Log the first step too: its loss is that of an untrained model."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses. Off: it costs a synchronisation a step, and hides NaN."}
    )
    greater_is_better: bool | None = field(
        default=False,
        metadata={"help": "Of `metric_for_best_model`: all metrics of an evaluation are better if lower."},
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
        # private: the one place where TrainingArguments holds the number; there is no argument for it.
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
