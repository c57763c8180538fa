"""The memory of a training step, found by running the real step on tensors that have a shape and no content.

PyTorch's `FakeTensorMode` runs every operation of the model, of its backward pass and of the optimizer without
allocating or computing anything. `LiveBytes` watches which storages are alive at each moment. So the figure follows
the code: whatever the model, the loss or the optimizer allocates is counted, and no formula has to be kept in step.
A 1.5B model takes some seconds on a laptop.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # private, but what torch.export and torchtitan use for this
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode  # private: the documented way to see every operation
from torch.utils._pytree import tree_iter  # private: what dispatch modes walk their outputs with

from llmkit.model import loss


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, each storage once and until it is freed.

    Attributes:
        now: bytes that are alive.
        peak: the most that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
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
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank at the peak of a training step.

    Attributes:
        weights: parameters and buffers.
        gradients: of all trained parameters.
        optimizer: its state.
        activations: everything else that is alive at the peak: activations, the loss's chunk, temporary tensors.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(
    build: Callable[[], torch.nn.Module],
    loss_of: Callable[[torch.nn.Module], torch.Tensor],
    create_optimizer: Callable[[torch.nn.Module], Optimizer],
    *,
    device_type: str,
    autocast: torch.dtype | None,
    accumulate: bool,
) -> StepMemory:
    """The memory of one optimizer step, after a first one that makes the optimizer's state.

    Args:
        build: makes the model, ready to train. Called under fake tensors, as are the next two.
        loss_of: makes a micro-batch and its loss.
        create_optimizer: makes the optimizer.
        device_type: "cpu" or "cuda", which decides how large the chunks of the loss are.
        autocast: the dtype of products, or None for that of the weights.
        accumulate: whether a step has several micro-batches, so that gradients are alive during the forward pass.
    """
    live = LiveBytes()
    with _chunks_of(device_type), FakeTensorMode(), live:
        model = build()
        optimizer = create_optimizer(model)
        for _ in range(2):
            live.peak = live.now
            for _ in range(2 if accumulate else 1):
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    value = loss_of(model)
                value.backward()
                del value
            trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            gradients = _bytes(parameter.grad for parameter in trained)
            optimizer.zero_grad()
        weights = _bytes([*model.parameters(), *model.buffers()])
        state = _bytes(value for each in optimizer.state.values() for value in each.values())
    return StepMemory(weights, gradients, state, live.peak - weights - gradients - state)


def _bytes(values: Iterable) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in values if torch.is_tensor(t)}
    return sum(storages.values())


@contextmanager
def _chunks_of(device_type: str) -> Iterator[None]:
    """Take the loss in the chunks of that device, while the tensors say that they are a CPU's.

    Fake tensors stay on the CPU: which attention kernel a GPU would take is decided by code that only a CUDA build of
    PyTorch has. The CPU's flash attention stores the same tensors for its backward pass.
    """
    chunk, softmax = loss.CHUNK_ELEMENTS["cpu"], loss.SOFTMAX_ELEMENTS
    if device_type != "cpu":
        loss.CHUNK_ELEMENTS["cpu"] = loss.SOFTMAX_ELEMENTS = loss.CHUNK_ELEMENTS["cuda"]
    try:
        yield
    finally:
        loss.CHUNK_ELEMENTS["cpu"], loss.SOFTMAX_ELEMENTS = chunk, softmax


def largest_micro_batch(small: tuple[int, int], large: tuple[int, int], limit: float) -> int:
    """The largest micro-batch whose step fits into `limit` bytes; 0 if not even 1 does.

    The memory of a step grows linearly with the micro-batch, but for the chunks of the loss, so two sizes tell it.

    Args:
        small, large: a micro-batch and the bytes of its step, twice.
    """
    slope = max(1.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0, int(small[0] + (limit - small[1]) / slope))
