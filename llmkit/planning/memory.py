"""The memory of a training step, found by running the real step on tensors that have a shape and no content.

PyTorch's `FakeTensorMode` runs every operation of the model, of its backward pass and of the optimizer without
allocating or computing anything. `LiveBytes` watches which storages are alive at each moment. So the figure follows
the code: whatever the model, the loss or the optimizer allocates is counted, and no formula has to be kept in step.
A 1.5B model takes some seconds on a laptop.
"""

import inspect
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # private, but what torch.export and torchtitan use for this
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode  # private: the documented way to see every operation
from torch.utils._pytree import tree_iter  # private: what dispatch modes walk their outputs with

from llmkit.errors import UserError
from llmkit.model import loss, modeling_gpt2

MEASURED = 10.0  # seconds of steps, at least, that a pace is measured over


@dataclass(frozen=True)
class Step:
    """What an optimizer step of a run is made of: called under fake tensors to plan it, or in earnest to time it.

    Attributes:
        build: makes the model, ready to train.
        loss_of: makes a micro-batch and its loss.
        create_optimizer: makes the optimizer of the model.
        accumulate: whether a step has several micro-batches, so that gradients are alive during the forward pass.
    """

    build: Callable[[], torch.nn.Module]
    loss_of: Callable[[torch.nn.Module], torch.Tensor]
    create_optimizer: Callable[[torch.nn.Module], Optimizer]
    accumulate: bool = False


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, each storage once and until it is freed.

    Attributes:
        now: bytes that are alive.
        peak: the most that were alive at one time.
        of_loss: those among them, at the peak, that `llmkit.model.loss` made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.of_loss = 0
        self._of_loss_now = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # private: the address of the storage, its identity
        if key in self._alive:
            return
        of_loss = size if _called_by_loss() else 0
        self.now += size
        self._of_loss_now += of_loss
        if self.now > self.peak:
            self.peak, self.of_loss = self.now, self._of_loss_now

        def freed(_: weakref.ref) -> None:
            self.now -= size
            self._of_loss_now -= of_loss
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)


def _called_by_loss() -> bool:
    """Whether the operation that is run comes from the loss's module."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == loss.__file__:
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank at the peak of a training step.

    Attributes:
        weights: parameters and buffers.
        gradients: of all trained parameters.
        optimizer: its state.
        activations: everything else that is alive at the peak: activations and temporary tensors.
        loss_chunk: the logits of a chunk and what else the loss holds at the peak, which may lie elsewhere.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_chunk: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss_chunk


@dataclass(frozen=True)
class Pace:
    """Measured seconds: of a micro-batch, forward and backward, and of the update once a step."""

    micro_batch: float
    update: float


def step_memory(step: Step, *, device_type: str, autocast: torch.dtype | None, compiled: bool = False) -> StepMemory:
    """The memory of an optimizer step when the optimizer has its state.

    Args:
        device_type: "cpu" or "cuda", which decides how large the chunks of the loss are.
        autocast: the dtype of products, or None for that of the weights.
        compiled: whether the run uses torch.compile. The step here does not, but keeps what a compiled one keeps.

    Raises:
        UserError: the optimizer looks at values, which fake tensors do not have.
    """
    live = LiveBytes()
    with _as_planned(device_type, compiled), FakeTensorMode(), live:
        model = step.build()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer = step.create_optimizer(model)
            optimizer.step()  # makes its state, as the first step of a run does
        except RuntimeError as error:
            raise UserError(
                "the memory of this optim cannot be planned, for it takes no step on tensors without content "
                f"({type(error).__name__}): plan with optim: adamw_torch_fused, whose moments are 8 bytes a parameter"
            ) from error
        if not step.accumulate:
            optimizer.zero_grad()
        live.peak, live.of_loss = live.now, 0
        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            value = step.loss_of(model)
        value.backward()
        del value
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        gradients = _bytes(parameter.grad for parameter in trained)
        weights = _bytes([*model.parameters(), *model.buffers()])
        state = _bytes(value for each in optimizer.state.values() for value in each.values())
    rest = live.peak - weights - gradients - state
    of_loss = min(live.of_loss, rest)
    return StepMemory(weights, gradients, state, rest - of_loss, of_loss)


def measured_pace(step: Step, autocast: torch.dtype | None, compiled: bool) -> Pace:
    """Real steps on this machine's device. The first two, which compile and find their memory, are not timed.

    Args:
        compiled: with torch.compile.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    micro_batch = update = 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with device:
        model = step.build()
        optimizer = step.create_optimizer(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        called: torch.nn.Module = torch.compile(model) if compiled else model  # pyrefly: ignore[bad-assignment]
        for count in range(-2, 1_000_000):
            start = now()
            with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
                value = step.loss_of(called)
            value.backward()
            middle = now()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if count >= 0:
                micro_batch, update = micro_batch + middle - start, update + now() - middle
            if count >= 2 and micro_batch + update >= MEASURED:
                break
    return Pace(micro_batch / (count + 1), update / (count + 1))


def _bytes(values: Iterable) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in values if torch.is_tensor(t)}
    return sum(storages.values())


@contextmanager
def _as_planned(device_type: str, compiled: bool) -> Iterator[None]:
    """Take the loss in the chunks of that device, while the tensors say that they are a CPU's.

    Where the run is compiled, no activation function is computed again: torch.compile keeps its input and its output.

    Fake tensors stay on the CPU: which attention kernel a GPU would take is decided by code that only a CUDA build of
    PyTorch has. The CPU's flash attention stores the same tensors for its backward pass.
    """
    chunk, softmax, pads = loss.CHUNK_ELEMENTS["cpu"], loss.SOFTMAX_ELEMENTS, loss.PADS_WEIGHT["cpu"]
    recompute_from = modeling_gpt2.RECOMPUTE_FROM
    if compiled:
        modeling_gpt2.RECOMPUTE_FROM = sys.maxsize
    if device_type != "cpu":
        loss.PADS_WEIGHT["cpu"] = True
        loss.CHUNK_ELEMENTS["cpu"] = loss.SOFTMAX_ELEMENTS = loss.CHUNK_ELEMENTS["cuda"]
    try:
        yield
    finally:
        loss.CHUNK_ELEMENTS["cpu"], loss.SOFTMAX_ELEMENTS, loss.PADS_WEIGHT["cpu"] = chunk, softmax, pads
        modeling_gpt2.RECOMPUTE_FROM = recompute_from


def largest_micro_batch(small: tuple[int, int], large: tuple[int, int], limit: float) -> int:
    """The largest micro-batch whose step fits into `limit` bytes; 0 if not even 1 does.

    The memory of a step grows linearly with the micro-batch, but for the chunks of the loss, so two sizes tell it.

    Args:
        small, large: a micro-batch and the bytes of its step, twice.
    """
    slope = max(1.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0, int(small[0] + (limit - small[1]) / slope))
