"""The tracks of the speedrun, and what is tried on them: one change to the baseline in each variant.

The settings are written out here, and not read from `recipes/`, so that a line of the results means the same after a
recipe has changed.
"""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.speedrun.tricks import JORDAN, POLAR_EXPRESS, Tricks


@dataclass(frozen=True)
class Variant:
    """A change to a track's baseline.

    Attributes:
        what: in words.
        recipe: keys of a recipe, in place of the track's.
        tricks: what a recipe cannot say.
    """

    what: str
    recipe: dict[str, Any] = field(default_factory=dict)
    tricks: Tricks = Tricks()


# recipes/pretrain_quickstart.yaml and recipes/pretrain_characters.yaml as they were when the speedrun began.
TRACKS: dict[str, dict[str, Any]] = {
    "stdlib": {
        "tokenizer": "bpe",
        "vocab_size": 4096,
        "validation_fraction": 0.02,
        "block_size": 256,
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 128,
        "total_batch_tokens": 4096,
        "per_device_train_batch_size": 16,
        "learning_rate": 1.4e-2,
        "muon_learning_rate": 1.4e-2,
        "lr_schedule": "cosine",
        "warmup_steps": 0.057,
    },
    "characters": {
        "tokenizer": "character",
        "validation_split": "tail",
        "validation_fraction": 0.1,
        "block_size": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "total_batch_tokens": 1536,
        "per_device_train_batch_size": 24,
        "learning_rate": 4e-3,
        "muon_learning_rate": 2e-2,
        "lr_schedule": "linear",
        "warmup_steps": 0.066,
    },
}
# Of both tracks.
COMMON = {
    "optim": "muon",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "bf16": False,
    "per_device_eval_batch_size": 32,
}

BASELINE = "baseline"
VARIANTS: dict[str, Variant] = {
    BASELINE: Variant("the recipe as it was"),
    # Muon
    "split QKV": Variant(
        "query, key and value of c_attn orthogonalised each by itself", tricks=Tricks(split_qkv=True)
    ),
    "NorMuon": Variant("each row of a step divided by its running root mean square", tricks=Tricks(normalized=0.95)),
    "NorMuon, no state": Variant("NorMuon with the step's own root mean square", tricks=Tricks(normalized=0.0)),
    "equal rows": Variant("NorMuon, no state, with steps of exactly AdamW's size", tricks=Tricks(equal_rows=True)),
    "Polar Express": Variant(
        "the coefficients of Amsel et al., 5 iterations", tricks=Tricks(coefficients=POLAR_EXPRESS)
    ),
    "3 iterations": Variant(
        "3 iterations of Polar Express, not 5 of Jordan's", tricks=Tricks(coefficients=POLAR_EXPRESS[:3])
    ),
    "4 iterations": Variant("4 of Jordan's iterations, not 5", tricks=Tricks(coefficients=(JORDAN,) * 4)),
    "momentum 0.9": Variant("Muon's momentum 0.9, not 0.95", tricks=Tricks(momentum=0.9)),
    "momentum warm-up": Variant(
        "Muon's momentum from 0.85 to 0.95 over 0.3 of the run", tricks=Tricks(momentum_from=0.85)
    ),
    "cautious decay": Variant(
        "weights decay only where the step makes them smaller", tricks=Tricks(cautious_decay=True)
    ),
    "zero projections": Variant(
        "both projections into the residual stream begin at zero", tricks=Tricks(zero_projections=True)
    ),
    # AdamW's part
    "token rate 1/2": Variant("wte's learning rate halved", tricks=Tricks(token_rate=0.5)),
    "token rate x 2": Variant("wte's learning rate doubled", tricks=Tricks(token_rate=2.0)),
    "position rate 1/4": Variant("wpe's learning rate a quarter", tricks=Tricks(position_rate=0.25)),
    "vector rate 1/4": Variant("LayerNorms' and biases' learning rate a quarter", tricks=Tricks(vector_rate=0.25)),
    "no embedding decay": Variant("no weight decay on wte and wpe", tricks=Tricks(decay_embeddings=False)),
    "beta2 0.95": Variant("AdamW's beta2 0.95, not 0.99", recipe={"adam_beta2": 0.95}),
    "no decay": Variant("no weight decay at all", recipe={"weight_decay": 0.0}),
    "decay x 3": Variant("weight decay 0.3, not 0.1", recipe={"weight_decay": 0.3}),
    # schedule
    "short warm-up": Variant("a warm-up over 0.02 of the run", recipe={"warmup_steps": 0.02}),
    "linear": Variant("linear to zero", recipe={"lr_schedule": "linear"}),
    "wsd": Variant(
        "stable, and down over the last 0.4 of the run", recipe={"lr_schedule": "wsd", "wsd_decay_steps": 0.4}
    ),
    "tail average": Variant("the mean of the weights over the last 0.1 of the run", tricks=Tricks(tail_average=0.1)),
    # batch and data
    "half batch": Variant("half as many tokens in a step, twice the steps", recipe={"batch": 0.5}),
    "half batch, rate 0.7": Variant("half the batch, both learning rates x 0.7", recipe={"batch": 0.5, "rate": 0.7}),
    "quarter batch": Variant("a quarter of the tokens in a step, four times the steps", recipe={"batch": 0.25}),
    "batch ramp": Variant("the batch grows from a quarter over the first 0.3 of the run", recipe={"ramp": 0.3}),
    "short windows": Variant(
        "windows of half the length in the first 0.4 of the run", tricks=Tricks(short_windows=0.4)
    ),
    "aligned windows": Variant("windows begin where a document begins", tricks=Tricks(aligned=True)),
    # several at once
    "half batch, NorMuon": Variant("both", recipe={"batch": 0.5}, tricks=Tricks(normalized=0.95)),
    "half batch, NorMuon, split QKV": Variant(
        "all three", recipe={"batch": 0.5}, tricks=Tricks(normalized=0.95, split_qkv=True)
    ),
    "half batch, NorMuon, no state, split QKV": Variant(
        "all three", recipe={"batch": 0.5}, tricks=Tricks(normalized=0.0, split_qkv=True)
    ),
    "half batch, equal rows, split QKV": Variant(
        "all three", recipe={"batch": 0.5}, tricks=Tricks(equal_rows=True, split_qkv=True)
    ),
    "quarter batch, equal rows, split QKV": Variant(
        "all three", recipe={"batch": 0.25}, tricks=Tricks(equal_rows=True, split_qkv=True)
    ),
    "quarter batch, rate 0.5, equal rows, split QKV": Variant(
        "all, and both learning rates halved",
        recipe={"batch": 0.25, "rate": 0.5},
        tricks=Tricks(equal_rows=True, split_qkv=True),
    ),
    "half batch, rate 0.7, equal rows, split QKV": Variant(
        "all, and both learning rates x 0.7",
        recipe={"batch": 0.5, "rate": 0.7},
        tricks=Tricks(equal_rows=True, split_qkv=True),
    ),
    "equal rows, split QKV": Variant("both", tricks=Tricks(equal_rows=True, split_qkv=True)),
    "linear, AdamW x 2, split QKV": Variant(
        "the quickstart's recipe now: all three, with AdamW's rate doubled",
        recipe={"lr_schedule": "linear"},
        tricks=Tricks(token_rate=2.0, position_rate=2.0, vector_rate=2.0, split_qkv=True),
    ),
    "linear, AdamW x 2, split QKV, momentum 0.9": Variant(
        "the quickstart's recipe now, with Muon's momentum 0.9",
        recipe={"lr_schedule": "linear"},
        tricks=Tricks(token_rate=2.0, position_rate=2.0, vector_rate=2.0, split_qkv=True, momentum=0.9),
    ),
    "half batch, NorMuon, momentum 0.9": Variant(
        "all three", recipe={"batch": 0.5}, tricks=Tricks(normalized=0.95, momentum=0.9)
    ),
    # shape of the attention, at the same number of parameters
    "twice the heads": Variant("twice as many heads of half the size", recipe={"heads": 2}),
}


def settings(track: str, variant: str, tokens: int) -> dict[str, Any]:
    """The recipe's keys of a run of `tokens` tokens. What a variant states in relation to its track is worked out."""
    keys = {**COMMON, **TRACKS[track], **VARIANTS[variant].recipe}
    batch, rate, heads, ramp = keys.pop("batch", 1), keys.pop("rate", 1), keys.pop("heads", 1), keys.pop("ramp", 0)
    for name in ("total_batch_tokens", "per_device_train_batch_size"):
        keys[name] = int(keys[name] * batch)
    for name in ("learning_rate", "muon_learning_rate"):
        keys[name] *= rate
    keys["n_head"] *= heads
    if ramp:
        keys |= {"batch_ramp_start": keys["total_batch_tokens"] // 4, "batch_ramp_tokens": int(tokens * ramp)}
    return keys | {"max_steps": tokens // keys["total_batch_tokens"]}
