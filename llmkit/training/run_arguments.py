"""What the arguments of pretraining and of fine-tuning share: checks, and precision chosen from the machine."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available, strtobool

from llmkit.errors import UserError
from llmkit.machine import bf16_is_fast
from llmkit.paths import expand_homes
from llmkit.training.compatibility import CheckpointingArguments
from llmkit.training.inherited_arguments import DECISIVE, REFUSED, refuse_accelerator_config, refuse_unsupported
from llmkit.training.ranges import check_ranges
from llmkit.training.reliability_arguments import ReliabilityArguments
from llmkit.training.schedules import ScheduleArguments

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile


@dataclass
class RunArguments(ScheduleArguments, ReliabilityArguments, CheckpointingArguments):
    """What the arguments of every run have beside TrainingArguments."""

    # The inherited fields that a resumed run has to have the same, those that are refused, each with its reason, and
    # what `metric_for_best_model` may name.
    DECISIVE: ClassVar[set[str]] = DECISIVE
    REFUSED: ClassVar[Mapping[str, str]] = REFUSED
    METRICS: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    # The length of a run is stated in one way; the command line's takes the place of the file's.
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train_minutes": ("max_steps", "num_train_epochs"),
        "max_steps": ("train_minutes",),
        "num_train_epochs": ("train_minutes",),
    }

    compiles_by_default = False  # no field: whether torch_compile was chosen here, and is not the user's word

    train_minutes: float | None = field(
        default=None,
        metadata={
            "help": "In place of max_steps: train so long on this machine, evaluations, samples and saves included. "
            "The number of steps follows from the pace, which is measured before the first step."
        },
    )

    if TYPE_CHECKING:
        output_dir: str = ""  # TrainingArguments fills it in

    sample_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts, or in fine-tuning questions, that are answered at each evaluation."},
    )
    sample_tokens: int = field(default=128, metadata={"help": "The longest sample, in tokens."})

    # Chosen from the machine where not stated.
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Use bfloat16 autocast. The default is accelerate's setting, or what this machine is fast at."
        },
    )

    # Other defaults than Trainer's, each for a reason.
    logging_first_step: bool = field(
        default=True, metadata={"help": "Log the first step too, so that curves begin where training begins."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not supported, because a loss that is not finite stops the run."}
    )
    greater_is_better: bool | None = field(
        default=False,
        metadata={"help": "Always false: every metric of an evaluation is better if it is lower."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Let DDP search for unused parameters. Every parameter is used in every step, so it need not."
        },
    )

    def __post_init__(self):
        expand_homes(self, "output_dir", "resume_from_checkpoint")
        refuse_unsupported(self, self.REFUSED)
        check_ranges(self)
        choose_precision(self)
        super().__post_init__()
        refuse_accelerator_config(self)
        check_budget(self)
        use_one_gpu(self)
        # A stated `bf16: false` holds against the accelerate configuration, which TrainingArguments would follow.
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        check_names(self)


def check_budget(args: RunArguments) -> None:
    """Refuse a length in minutes beside another one, or with what its steps could not be counted for.

    Raises:
        UserError: the line says what to leave out.
    """
    minutes = args.train_minutes
    if minutes is None:
        return
    if not 0 < minutes < math.inf:
        raise UserError(f"train_minutes={minutes}: give minutes, such as 10")
    for name, default in (("max_steps", -1), ("num_train_epochs", 3.0)):  # the defaults are Trainer's
        if (value := getattr(args, name)) != default:
            raise UserError(f"train_minutes={minutes:g} and {name}={value}: give one of them")
    for name in ("eval_strategy", "save_strategy"):
        if getattr(args, name) == "epoch":
            raise UserError(f"{name}: epoch does not go with train_minutes: give steps, or a part such as 0.2")


def check_names(args: RunArguments) -> None:
    """Refuse names that nothing here has, before anything is written.

    Raises:
        UserError: the line says what there is.
    """
    available = get_available_reporting_integrations()
    if missing := [name for name in args.report_to or () if name not in available]:
        raise UserError(f"report_to={missing[0]} is not installed here: choose from {', '.join(available)} and none")
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in args.METRICS:
        raise UserError(f"metric_for_best_model={metric}: choose from {', '.join(args.METRICS)}")
    if isinstance(kwargs := args.activation_checkpointing_kwargs, str):
        raise UserError(f"activation_checkpointing_kwargs={kwargs}: give a mapping, such as {{use_reentrant: false}}")
    if metric is None and args.save_strategy == SaveStrategy.BEST:
        raise UserError(f"save_strategy: best needs metric_for_best_model: {', '.join(args.METRICS)}")
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    if args.torch_compile and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(f"torch_compile_backend={backend}: choose from {', '.join(known)}")
    if mode is not None and mode not in COMPILE_MODES:
        raise UserError(f"torch_compile_mode={mode}: choose from {', '.join(COMPILE_MODES)}")
    if isinstance(args.optim, OptimizerNames):
        check_optimizer(args)
    if args.fsdp and args.world_size == 1:
        raise UserError(
            "fsdp shards a model over several processes: start them with accelerate launch, or leave fsdp out"
        )
    if args.deepspeed_plugin is not None:
        raise UserError("DeepSpeed, which the accelerate configuration asks for, is not supported: take DDP or FSDP")


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer of Trainer's that is not supported, whose package is missing, or whose `optim_args` are bad.

    Raises:
        UserError: the reason, or what Trainer says about it.
    """
    name = OptimizerNames(args.optim).value
    if any(kind in name for kind in ("galore", "apollo", "lomo")):
        raise UserError(
            f"optim={name} is not supported: GaLore, APOLLO and LOMO choose their own parameters, past the groups "
            "without weight decay, or step before a gradient is clipped and checked: take another optimizer"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise UserError(f"optim={name}: {error}") from error


def device_type(args: TrainingArguments) -> str:
    """The type of the device that will be trained on."""
    configured_cpu = strtobool(os.environ.get("ACCELERATE_USE_CPU", "false"))  # accelerate_configs/cpu.yaml
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if args.use_cpu or configured_cpu or accelerator is None else accelerator.type


def choose_precision(args: TrainingArguments) -> None:
    """Set what is not stated of `use_cpu`, `bf16`, `fp16` and `tf32`, from accelerate's configuration and the machine.

    Raises:
        UserError: the configuration asks for a precision that Trainer does not have.
    """
    device = device_type(args)
    args.use_cpu = device == "cpu"
    if args.bf16 is None and not args.fp16:
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if configured not in ("no", "bf16", "fp16"):
            raise UserError(f"mixed_precision: {configured} of the accelerate configuration: take bf16, fp16 or no")
        args.fp16 = configured == "fp16"
        args.bf16 = configured == "bf16" or (configured == "no" and bf16_is_fast(device))
    args.bf16 = bool(args.bf16)
    if args.tf32 is None and device == "cuda" and is_torch_tf32_available():
        args.tf32 = True


def check_length_is_fixed(args: RunArguments) -> None:
    """Refuse to make a trainer of arguments whose number of steps is not known yet.

    Raises:
        UserError: the line says what fixes it.
    """
    if args.train_minutes is not None and args.max_steps < 1:
        raise UserError("train_minutes: call llmkit.training.budget.fix_length, which measures the pace, or max_steps")


def use_one_gpu(args: TrainingArguments) -> None:
    """Keep a process to its GPU: one that was started alone would get all of them, and Trainer its nn.DataParallel."""
    if args.n_gpu > 1:
        # private: the one place where TrainingArguments holds the number; there is no argument for it.
        args._n_gpu = 1
