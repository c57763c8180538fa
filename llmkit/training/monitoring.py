"""What a run watches beside its loss: HellaSwag, how the kinds of parameters fare, and what it takes of the machine.

All of it goes through `trainer.log`, so that log.jsonl, wandb, TensorBoard and trackio have the same names, the last
three with Trainer's `train/` before them.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, TrainerCallback

from llmkit.evaluation.hellaswag import Question, score_hellaswag
from llmkit.runs.run import LOG, read_log
from llmkit.training.stopping import EvaluationStopped, StopOnRequest

# A parameter's kind is told by its name, from `transformer.` on.
KINDS = {
    "token_embedding": ("wte.",),
    "position_embedding": ("wpe.",),
    "attention": (".attn.",),
    "mlp": (".mlp.",),
    "layernorm": (".ln_1.", ".ln_2.", "ln_f."),
}


class ResourceUse:
    """What this process takes of its machine. The system's own counters are read, which waits for no device.

    - `memory_gib`: the most main memory that the process has had at any time (not known on Windows);
    - `cpu_utilization`: its processor time since the last measurement, of all that the CPUs could have given it;
    - `gpu_memory_gib`: the most that torch has taken of the GPU's memory for tensors;
    - `gpu_utilization`: the part of the last moments in which the GPU was at work, where `nvidia-ml-py` is installed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before = time.perf_counter(), time.process_time()

    def measure(self) -> dict[str, float]:
        """The figures now, as they are logged."""
        now = time.perf_counter(), time.process_time()
        passed, worked = (later - sooner for later, sooner in zip(now, self.before, strict=True))
        self.before = now
        found = {"cpu_utilization": worked / passed / _cpus()}
        if sys.platform != "win32":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
            found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        if self.device.type == "cuda":
            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            if find_spec("pynvml"):
                found["gpu_utilization"] = torch.cuda.utilization(self.device) / 100
        return found


def _cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class HellaSwagInTraining(TrainerCallback):
    """Scores the model at each `every`-th step, right after the step was logged, so that no speed counts the time.

    All ranks share the questions. The scoring draws no random numbers. A run that is asked to stop leaves it, and
    makes up for it when it goes on.

    Args:
        questions: the encoded questions.
        every: steps, a multiple of `logging_steps`.
        batch_size: questions that a rank scores at once.
        log: `trainer.log`.
        stop: what tells whether the run is to stop.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        every: int,
        batch_size: int,
        accelerator: Accelerator,
        log: Callable[[dict[str, float]], None],
        stop: StopOnRequest,
    ):
        self.questions, self.every, self.batch_size = questions, every, batch_size
        self.accelerator, self.log, self.stop = accelerator, log, stop

    def on_train_begin(self, args, state, control, **kwargs):
        step, log = state.global_step, Path(args.output_dir) / LOG
        missing = [step and step % self.every == 0 and log.exists() and not _is_scored(log, step)]
        if broadcast_object_list(missing)[0]:
            self._score(args, control, kwargs["model"])

    def on_log(self, args, state, control, **kwargs):
        if "loss" in kwargs["logs"] and state.global_step % self.every == 0:
            self._score(args, control, kwargs["model"])

    def _score(self, args, control, model: PreTrainedModel) -> None:
        leave = partial(self.stop.leave_evaluation, args)
        try:
            with self.accelerator.autocast():
                found = score_hellaswag(model, self.questions, self.batch_size, self.accelerator, leave)
        except EvaluationStopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        else:
            self.log(found)


def _is_scored(log: Path, step: int) -> bool:
    return any(record["step"] == step and "hellaswag/questions" in record for record in read_log(log))


class ParameterMonitor(TrainerCallback):
    """Norms of each kind of parameters, at each `every`-th step, of that step itself.

    - `grad_norm/KIND`: of the gradient before clipping, so that their squares add up to that of `grad_norm`;
    - `param_norm/KIND`: of the parameters before the step;
    - `update_ratio/KIND`: the norm of what the step changed over that. At a learning rate that suits a model it is
      often about 1e-3; far more shakes the weights, far less leaves them where they are.

    A monitored step holds a second copy of the parameters while the optimizer works; the others cost nothing. Under
    DDP each rank has whole gradients and parameters, and finds the same.
    """

    def __init__(self, model: PreTrainedModel, every: int):
        self.every = every
        self.kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
        for name, parameter in model.named_parameters():
            (kind,) = [kind for kind, parts in KINDS.items() if any(part in name for part in parts)]
            self.kinds[kind].append(parameter)
        self.step = -1
        self.figures: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if (state.global_step + 1) % self.every == 0:
            self.before = [[p.detach().clone() for p in parameters] for parameters in self.kinds.values()]
            for kind, parameters in self.kinds.items():
                self.figures[f"grad_norm/{kind}"] = get_total_norm([p.grad for p in parameters if p.grad is not None])

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        if (state.global_step + 1) % self.every:
            return
        for (kind, parameters), before in zip(self.kinds.items(), self.before, strict=True):
            norm = get_total_norm(before)
            change = get_total_norm([old.sub_(new) for old, new in zip(before, parameters, strict=True)])
            self.figures |= {f"param_norm/{kind}": norm, f"update_ratio/{kind}": change / norm}
        self.step = state.global_step + 1
        del self.before

    def measured(self, step: int, grad_norm: float | None) -> dict[str, float]:
        """The figures of a step, none where it was not monitored.

        Args:
            grad_norm: of all parameters, before clipping: what was found after it is scaled back. None where Trainer
                did not clip.
        """
        if step != self.step:
            return {}
        found = dict(zip(self.figures, torch.stack(list(self.figures.values())).tolist(), strict=True))
        clipped = math.hypot(*(found[f"grad_norm/{kind}"] for kind in self.kinds))
        if clipped and grad_norm is not None:
            for kind in self.kinds:
                found[f"grad_norm/{kind}"] *= grad_norm / clipped
        return found
