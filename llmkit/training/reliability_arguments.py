"""What a run does when something goes wrong, as fields of its arguments."""

from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from llmkit.errors import UserError
from llmkit.training.ranks import join_ranks


@dataclass
class ReliabilityArguments:
    """For PretrainArguments and SFTArguments alike."""

    on_save_failure: Literal["continue", "stop"] = field(
        default="continue",
        metadata={"help": "If a checkpoint cannot be written: continue (and try at the next save), or stop."},
    )

    def __post_init__(self):
        join_ranks(self)
        super().__post_init__()
        for name, kind in get_type_hints(ReliabilityArguments).items():
            if (choices := get_args(kind)) and getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)}: choose from {', '.join(choices)}")
