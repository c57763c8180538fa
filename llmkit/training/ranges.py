"""Which numbers a run can have. Imports no torch: a value out of its range is answered at once."""

import math
from typing import TYPE_CHECKING

from llmkit.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The lowest value that is taken, and the one from which on it is too large.
RANGES = {
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "data_seed": (0, 2**32),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_timeout": (1, math.inf),
    "eval_delay": (0, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "max_steps": (-1, 10**8),
    "neftune_noise_alpha": (0, math.inf),
    "num_train_epochs": (0, 10**8),
    "per_device_eval_batch_size": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "sample_tokens": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "seed": (0, 2**32),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
}


def check_ranges(args: "TrainingArguments") -> None:
    """Refuse numbers that no run could have; call it before `TrainingArguments.__post_init__` fills some in.

    Raises:
        UserError: the line names the field and what it may be.
    """
    for name, (lowest, limit) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value < limit:  # NaN is not either
            below = f" and below {limit:,}" if limit < math.inf else ""
            raise UserError(f"{name}={value}: must be at least {lowest}{below}")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            strategy = name.replace("steps", "strategy")
            raise UserError(f"{name}={value}: must be above 0, or give {strategy}: no")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise UserError("nothing to train: give max_steps of 1 or more, or num_train_epochs above 0")
