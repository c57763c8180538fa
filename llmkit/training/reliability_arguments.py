"""What a run does when something goes wrong, as fields of its arguments."""

from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from llmkit.errors import UserError
from llmkit.training.mixin import ArgumentsMixin
from llmkit.training.ranks import join_ranks


@dataclass
class ReliabilityArguments(ArgumentsMixin):
    """A part of RunArguments."""

    on_save_failure: Literal["continue", "stop"] = field(
        default="continue",
        metadata={
            "help": "What to do if a checkpoint cannot be written: continue and try again at the next save, or stop."
        },
    )
    on_nonfinite: Literal["stop", "skip"] = field(
        default="stop",
        metadata={
            "help": "What to do if a loss or gradient is not finite: stop, or skip the step (at most 10 of any 1,000)."
        },
    )
    on_spike: Literal["ignore", "warn", "skip"] = field(
        default="ignore",
        metadata={
            "help": "What to do if a step's loss is far above those before it: ignore it, warn, or skip the step."
        },
    )
    spike_zscore: float = field(
        default=6.0,
        metadata={"help": "How far above the mean a spike is, in standard deviations of the last 128 losses."},
    )

    def __post_init__(self):
        join_ranks(self)
        super().__post_init__()
        for name, kind in get_type_hints(ReliabilityArguments).items():
            if (choices := get_args(kind)) and getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)}: choose from {', '.join(choices)}")
        if not self.spike_zscore > 0:
            raise UserError(f"spike_zscore={self.spike_zscore}: give a number above 0, such as 6")
