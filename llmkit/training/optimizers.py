"""Muon, with AdamW for what is no matrix of a hidden layer, as one optimizer. AdamW alone is Trainer's own.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, found in five steps of a
Newton-Schulz iteration, so that all directions of a step have one length. It is scaled by 0.2 * sqrt(max(in, out)),
which gives it the root mean square of AdamW's usual step (Liu et al. 2025, Moonlight): learning rate and weight decay
keep their usual size, and the scale does not ask which side of a matrix is the input's. (The original one,
sqrt(out / in), does, and GPT-2's weights are stored the other way round than `nn.Linear`'s.)

GPT-2 stores the weights of query, key and value side by side as c_attn. They are three matrices, and each is
orthogonalised by itself. benchmarks/speedrun has what this gains.

    attention and MLP matrices    Muon, muon_learning_rate, with weight decay
    token and position embeddings AdamW, learning_rate, with weight decay
    LayerNorms and biases         AdamW, learning_rate, without

With `optim` other than muon, AdamW's two groups hold all of them: weight decay on matrices and embeddings, none on
LayerNorms and biases, as nanoGPT has it.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

# private: the size of a step, which torch has nowhere else.
from torch.optim._muon import _adjust_lr
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from llmkit.errors import UserError
from llmkit.training.mixin import ArgumentsMixin

MUON = "muon"

# The most weights whose steps are computed together. In bfloat16 on a CPU, one product of many matrices takes half the
# time of many products at a width of 128; at 768 it is no faster, and takes more memory.
AT_ONCE = 2**22


@dataclass
class OptimizerArguments(ArgumentsMixin):
    """For PretrainArguments: `optim` knows one optimizer more than TrainingArguments."""

    DECISIVE: ClassVar[set[str]] = {"muon_learning_rate"}

    optim: str = field(
        default="adamw_torch_fused",
        metadata={"help": "One of Trainer's optimizers, or muon: Muon for the layers' matrices, AdamW for the rest."},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Muon's learning rate. The default is learning_rate, which AdamW's part always uses."},
    )

    def __post_init__(self):
        wanted = self.optim
        if wanted == MUON:
            self.optim = "adamw_torch_fused"  # Trainer wants one that it knows, to be made an enum
        super().__post_init__()
        if wanted != MUON:
            if self.muon_learning_rate is not None:
                name = OptimizerNames(self.optim).value
                raise UserError(
                    f"muon_learning_rate is for optim: muon, not {name}: leave it out, or clear a recipe's with null"
                )
            return
        self.optim = MUON
        if self.muon_learning_rate is None:
            self.muon_learning_rate = self.learning_rate
        if not (self.learning_rate > 0 and self.muon_learning_rate > 0):
            raise UserError("optim: muon takes a learning_rate and a muon_learning_rate above 0")
        if self.optim_args:
            raise UserError("optim_args is not for optim: muon: leave it out")

    def describe_optimizer(self) -> str:
        """The optimizer and its settings, as in "adamw_torch_fused, lr 0.0006, weight decay 0.1, clip 1"."""
        is_muon = self.optim == MUON
        name = f"muon, lr {self.muon_learning_rate:g}, and adamw" if is_muon else OptimizerNames(self.optim).value
        rest = f"weight decay {self.weight_decay:g}, clip {self.max_grad_norm:g}"
        return f"{name}, lr {self.learning_rate:g}, {rest}"


def is_fully_sharded(args: TrainingArguments) -> bool:
    """Whether Trainer, or the accelerate configuration that the run was launched with, turns FSDP on."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def orthogonalize(
    matrices: torch.Tensor, coefficients: Iterable[tuple[float, float, float]], dtype: torch.dtype, eps: float
) -> torch.Tensor:
    """Matrices with the same singular vectors, and singular values near 1: an iteration for each of the coefficients.

    torch has this only inside its own Muon, for one matrix at a time and only in bfloat16. Processors without bfloat16
    products emulate them: with AVX2 alone, the matrices of a layer 128 wide took 182 ms, and 6 ms in float32.

    Args:
        matrices: (count, rows, columns), of any dtype.
        coefficients: a, b and c of the polynomial a x + b x^3 + c x^5 of the singular values.
        dtype: in which it is computed, and which the result has.
        eps: the least norm that a matrix is divided by.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.to(dtype, copy=True)
    x = x.mT if is_tall else x
    x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MatrixMuon(Muon):
    """torch's Muon, computed in a dtype that the device is fast at, on parameters in which several matrices may lie.

    Args:
        parameters: the weights, (in, out).
        parts: of each, how many matrices of one size lie side by side in it.
        dtype: of the iteration; torch's own is in bfloat16.
        lr, weight_decay: as torch's Muon has them. Momentum 0.95, Nesterov and 5 iterations are its defaults.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        parts: Sequence[int],
        dtype: torch.dtype,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
    ):
        groups = [{"params": parameters, "name": MUON}]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts, self.dtype = parts, dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "Trainer has none"
        (group,) = self.param_groups
        parameters: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        momenta: list[torch.Tensor] = []
        # private: Muon's own step begins with it
        self._init_group(group, parameters, gradients, momenta)
        if not parameters:  # a step that is left out, as one with a loss that is not finite
            return
        assert len(parameters) == len(self.parts), "a step gives each matrix a gradient"
        for gradient, momentum in zip(gradients, momenta, strict=True):
            momentum.lerp_(gradient, 1 - group["momentum"])
        for some in self.rounds(parameters):
            updates = [
                gradient.lerp(momentum, group["momentum"])  # Nesterov's
                for gradient, momentum in zip(gradients[some], momenta[some], strict=True)
            ]
            steps = self.orthogonal(updates, self.parts[some], group)
            for parameter, parts, step in zip(parameters[some], self.parts[some], steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                shape = torch.Size((parameter.size(0), parameter.size(1) // parts))
                parameter.add_(step, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], shape))

    def rounds(self, parameters: list[torch.Tensor]) -> Iterator[slice]:
        """Which parameters `orthogonal` is given at a time."""
        start = elements = 0
        for place, parameter in enumerate(parameters):
            if elements and elements + parameter.numel() > AT_ONCE:
                yield slice(start, place)
                start, elements = place, 0
            elements += parameter.numel()
        yield slice(start, len(parameters))

    def orthogonal(self, updates: list[torch.Tensor], parts: Sequence[int], group: dict) -> list[torch.Tensor]:
        """The updates with their parts orthogonalised, those of one shape together."""
        matrices = [
            part for update, number in zip(updates, parts, strict=True) for part in update.chunk(number, dim=1)
        ]
        places_of: dict[torch.Size, list[int]] = defaultdict(list)
        for place, matrix in enumerate(matrices):
            places_of[matrix.shape].append(place)
        coefficients = [group["ns_coefficients"]] * group["ns_steps"]
        for places in places_of.values():
            alike = torch.stack([matrices[place] for place in places])
            found = orthogonalize(alike, coefficients, self.dtype, group["eps"])
            for place, matrix in zip(places, found, strict=True):
                matrices[place] = matrix
        in_order = iter(matrices)
        return [torch.cat(list(itertools.islice(in_order, number)), dim=1) for number in parts]


class ShardedMuon(MatrixMuon):
    """MatrixMuon on matrices that FSDP2 has sharded: each is orthogonalised once, by one rank, which sends it.

    Momentum stays sharded. In a round, each of W ranks takes one of W matrices: all ranks gather the W, each works on
    its own and scatters the result in the dtype of the iteration. So a step sends each matrix once whole in float32
    and once in parts in that dtype, and a rank holds W whole matrices at a time.
    """

    # pyrefly: ignore[bad-override]  the tensors are DTensors, here and below
    def rounds(self, parameters: list[DTensor]) -> Iterator[slice]:
        mesh = parameters[0].device_mesh
        assert mesh.ndim == 1, "parallelism_config is refused"
        return (slice(start, start + mesh.size()) for start in range(0, len(parameters), mesh.size()))

    # pyrefly: ignore[bad-override]
    def orthogonal(self, updates: list[DTensor], parts: Sequence[int], group: dict) -> list[torch.Tensor]:
        mesh = updates[0].device_mesh
        whole = [update.full_tensor() for update in updates]
        rank = mesh.get_local_rank()
        found = [torch.empty_like(each, dtype=self.dtype) for each in whole]
        if rank < len(whole):
            (found[rank],) = super().orthogonal([whole[rank]], [parts[rank]], group)
        return [
            distribute_tensor(each.contiguous(), mesh, update.placements, src_data_rank=owner)
            for owner, (update, each) in enumerate(zip(updates, found, strict=True))
        ]


class MuonWithAdamW(Optimizer):
    """Both as one, to whoever steps, schedules, saves or loads it.

    The groups and the state are this optimizer's; the two inner ones see the same objects, AdamW the groups before the
    last one and Muon the last, so each does its part of a step.
    """

    def __init__(self, adamw: AdamW, muon: Muon):
        super().__init__([*adamw.param_groups, *muon.param_groups], defaults={})
        self.adamw, self.muon = adamw, muon
        self._share()

    def _share(self) -> None:
        self.adamw.param_groups, self.muon.param_groups = self.param_groups[:-1], self.param_groups[-1:]
        self.adamw.state = self.muon.state = self.state

    def step(self, closure=None) -> None:  # pyrefly: ignore[bad-override]  a closure is refused
        assert closure is None, "Trainer has none"
        self.adamw.step()
        self.muon.step()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # replaces both, groups and state
        self._share()


def create_muon(model: nn.Module, args: OptimizerArguments, decayed: Collection[str], has_bf16: bool) -> MuonWithAdamW:
    """The optimizer for a GPT-2.

    Args:
        args: with learning rates, weight decay and AdamW's own settings.
        decayed: the names of the parameters that have weight decay (`Trainer.get_decay_parameter_names`).
        has_bf16: whether all ranks are fast at bfloat16. Each applies the whole update, so they compute it alike.
    """
    assert args.muon_learning_rate is not None, "set with the arguments"
    hidden = {id(p) for p in model.get_submodule("transformer.h").parameters() if p.ndim == 2}
    matrices, parts, with_decay, without_decay = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in hidden:
            matrices.append(parameter)
            parts.append(3 if name.endswith("attn.c_attn.weight") else 1)
        else:
            (with_decay if name in decayed else without_decay).append(parameter)
    adamw = AdamW(
        [{"params": with_decay, "weight_decay": args.weight_decay}, {"params": without_decay, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    sharded = is_fully_sharded(args)  # the matrices are sharded after this, within the same groups
    muon = (ShardedMuon if sharded else MatrixMuon)(
        matrices,
        parts,
        torch.bfloat16 if has_bf16 else torch.float32,
        lr=args.muon_learning_rate,
        weight_decay=args.weight_decay,
    )
    return MuonWithAdamW(adamw, muon)


# The values of `optim` that Trainer does not know, and what makes each: of the model, the arguments, the names of the
# parameters that have weight decay, and whether all ranks are fast at bfloat16.
OPTIMIZERS = {MUON: create_muon}


def named_learning_rates(optimizer: Optimizer, learning_rate: float, peak: float) -> dict[str, float]:
    """The rates to be logged beside Trainer's one, `lr/NAME`: of the parameter groups that have a name.

    Args:
        learning_rate: the one that was logged, of the step that was done.
        peak: the highest one that it reaches.
    """
    named = [group for group in optimizer.param_groups if "name" in group]
    return {f"lr/{group['name']}": learning_rate * group["initial_lr"] / peak for group in named}
