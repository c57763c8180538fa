"""What llmkit's recipes cannot say, tried here first: changes to Muon, to the weights and to the data of a run.

A trick that wins moves into llmkit. The tables of `README.md` say which ones did, and which ones did not win.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW, Muon
from transformers import TrainerCallback

from llmkit.data.windows import TokenWindows
from llmkit.training.optimizers import MUON, MuonWithAdamW, orthogonalize
from llmkit.training.pretrain_trainer import PretrainTrainer

JORDAN = (3.4445, -4.7750, 2.0315)  # Muon's usual coefficients, the same in each iteration
# Amsel et al. 2025, "The Polar Express": the best polynomial of each iteration in turn, with their safety factor of
# 1.01, as the speedruns of GPT-2 use it.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class Tricks:
    """One run's; the defaults are what llmkit did when the speedrun began.

    Attributes:
        coefficients: of each iteration that orthogonalises.
        split_qkv: orthogonalise the query's, the key's and the value's part of c_attn each by itself. llmkit does now.
        normalized: divide each row's part of a step, along the longer side, by its root mean square, and keep the size
            of the whole step. The mean square is a running one with this weight of the past: 0.95 is NorMuon (Li et
            al. 2025, as the speedruns of GPT-2 have it), 0 takes the step's own alone, which needs no state.
        equal_rows: the same without a state, and the size of the whole step exactly AdamW's.
        momentum: of Muon.
        momentum_from: where Muon's momentum begins, to grow to its full size over the first 0.3 of the run.
        cautious_decay: decay a weight only where the step itself makes it smaller (Chen et al. 2025).
        zero_projections: begin with zeros in both projections into the residual stream.
        token_rate, position_rate, vector_rate: learning rates of wte, wpe, and of LayerNorms and biases, relative to
            learning_rate.
        decay_embeddings: give wte and wpe the weight decay.
        tail_average: the last part of the run over which weights are averaged for the last evaluation.
        short_windows: the first part of the run in which windows are cut into halves.
        aligned: windows begin where a document begins, and end where it ends.
    """

    coefficients: tuple[tuple[float, float, float], ...] = (JORDAN,) * 5
    split_qkv: bool = False
    normalized: float | None = None
    equal_rows: bool = False
    momentum: float = 0.95
    momentum_from: float | None = None
    cautious_decay: bool = False
    zero_projections: bool = False
    token_rate: float = 1.0
    position_rate: float = 1.0
    vector_rate: float = 1.0
    decay_embeddings: bool = True
    tail_average: float = 0.0
    short_windows: float = 0.0
    aligned: bool = False


class TriedMuon(Muon):
    """torch's Muon at the size of AdamW's steps, with the tricks."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, tricks: Tricks, steps: int):
        super().__init__([{"params": parameters, "name": MUON}], lr=lr, weight_decay=weight_decay)
        self.tricks, self.steps, self.done = tricks, steps, 0

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "Trainer has none"
        (group,) = self.param_groups
        momentum = self.momentum()
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            update = self.update(parameter.grad.lerp(state["momentum_buffer"], momentum), state)
            decay = group["lr"] * group["weight_decay"]
            if self.tricks.cautious_decay:
                parameter.sub_(parameter * (update * parameter > 0), alpha=decay)
            else:
                parameter.mul_(1 - decay)
            parameter.sub_(update, alpha=group["lr"])
        self.done += 1

    def momentum(self) -> float:
        end = self.tricks.momentum
        begin = self.tricks.momentum_from
        return end if begin is None else begin + (end - begin) * min(1.0, self.done / (0.3 * self.steps))

    def update(self, gradient: torch.Tensor, state: dict) -> torch.Tensor:
        """The step of one matrix at a learning rate of 1, with a root mean square of about 0.2."""
        is_c_attn = gradient.size(1) == 3 * gradient.size(0)
        parts = gradient.chunk(3, dim=1) if self.tricks.split_qkv and is_c_attn else [gradient]
        found = [
            orthogonalize(part.unsqueeze(0), self.tricks.coefficients, torch.bfloat16, eps=1e-7).squeeze(0).float()
            * 0.2
            * max(part.shape) ** 0.5
            for part in parts
        ]
        update = torch.cat(found, dim=1)
        if self.tricks.normalized is not None:  # along the shorter side all are of one size already
            squares = update.square().mean(dim=int(update.size(0) > update.size(1)), keepdim=True)
            state.setdefault("squares", torch.zeros_like(squares)).lerp_(squares, 1 - self.tricks.normalized)
            scaled = update / state["squares"].sqrt().clamp(min=1e-8)
            update = scaled * (update.norm() / scaled.norm())
        if self.tricks.equal_rows:
            update = update * (
                0.2 / update.square().mean(dim=int(update.size(0) > update.size(1)), keepdim=True).sqrt()
            )
        return update


class AlignedWindows(TokenWindows):
    """Windows of one document each. The last one of a document ends with it, and shares tokens with the one before.

    A document that is shorter than a window is followed by the begin of the next one.
    """

    def __init__(self, *args):
        super().__init__(*args)
        ids = self._read(0, self.num_tokens)
        ends = np.flatnonzero(ids == self.pad_id) + 1
        begins = np.concatenate([[0], ends[:-1]])
        last = self.num_tokens - self.block_size - 1
        places = [
            min(place, max(begin, end - 1 - self.block_size), last)
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
            for place in range(begin, end - 1, self.block_size)
        ]
        self.places, self.num_windows = places, len(places)

    def _read(self, start: int, stop: int) -> np.ndarray:
        if hasattr(self, "places"):
            start, stop = (self.places[start // self.block_size] + more for more in (0, stop - start))
        return super()._read(start, stop)


class TailAverage(TrainerCallback):
    """The mean of the weights after each step of the last part of a run; in place of the last ones at its end."""

    def __init__(self, part: float):
        self.part, self.mean, self.count = part, {}, 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > (1 - self.part) * state.max_steps:
            self.count += 1
            for name, parameter in model.named_parameters():
                mean = self.mean.setdefault(name, parameter.detach().clone())
                mean.lerp_(parameter.detach(), 1 / self.count)
            if state.global_step == state.max_steps:  # before its evaluation
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(self.mean[name])


class TriedTrainer(PretrainTrainer):
    """PretrainTrainer with tricks, which `set_tricks` sets before it trains."""

    def set_tricks(self, tricks: Tricks) -> None:
        self.tricks = tricks
        if tricks.tail_average:
            self.add_callback(TailAverage(tricks.tail_average))
        if tricks.zero_projections:
            for block in self.model.transformer.h:
                nn.init.zeros_(block.attn.c_proj.weight)
                nn.init.zeros_(block.mlp.c_proj.weight)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.model, self.args, self.tricks)
        return super().create_optimizer(model)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.state.global_step < self.tricks.short_windows * self.state.max_steps:
            half = self.block_size // 2
            inputs = {name: ids.view(-1, half) for name, ids in inputs.items()}
        return super().training_step(model, inputs, num_items_in_batch)


def create_optimizer(model: nn.Module, args, tricks: Tricks) -> MuonWithAdamW:
    """As `llmkit.training.optimizers.create_muon`, with the tricks."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    groups = [
        ([model.transformer.wte.weight], tricks.token_rate, tricks.decay_embeddings),
        ([model.transformer.wpe.weight], tricks.position_rate, tricks.decay_embeddings),
        ([p for p in model.parameters() if p.ndim == 1], tricks.vector_rate, False),
    ]
    adamw = AdamW(
        [
            {"params": p, "lr": args.learning_rate * rate, "weight_decay": args.weight_decay if decayed else 0.0}
            for p, rate, decayed in groups
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    muon = TriedMuon(matrices, args.muon_learning_rate, args.weight_decay, tricks, args.max_steps)
    return MuonWithAdamW(adamw, muon)


def windows(manifest, block_size: int, tricks: Tricks) -> tuple[TokenWindows, TokenWindows]:
    """Those to train on, and those for validation, which no trick changes."""
    kind = AlignedWindows if tricks.aligned else TokenWindows
    return kind(manifest, "train", block_size), TokenWindows(manifest, "validation", block_size)
