"""What is alive at the peak of a training step of llmkit's GPT-2, by part.

    python benchmarks/memory.py                                  # 6 layers, 384 wide, 12 x 256 tokens, float32
    python benchmarks/memory.py --preset 124M --batch_size 1 --bf16

Two steps are run on tensors without content, as `llmkit plan` runs them. The table is that of the second, which has
the moments of AdamW from the first. `training_step.py` measures the growth of a real process. That is more: freed
memory that lies between what is alive, and what torch keeps for itself.
"""

import argparse
import inspect
import weakref
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # private, as in llmkit.planning.memory
from torch.utils._python_dispatch import TorchDispatchMode  # private: the documented way to see every operation
from torch.utils._pytree import tree_iter  # private: what dispatch modes walk their outputs with

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.model import loss, modeling_gpt2
from loops import add_shape_options, bare_step, describe, model_sizes, parse_shape


class Alive(TorchDispatchMode):
    """Notes the bytes that are alive, by part, and how it was at the peak."""

    def __init__(self, shape: argparse.Namespace):
        super().__init__()
        self.shape = shape
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return output

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # private: the address of the storage, its identity
        if key in self.seen:
            return
        part = self._part(tensor)

        def freed(_: weakref.ref) -> None:
            self.now[part] -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, freed)
        self.now[part] += size
        if self.now.total() > self.at_peak.total():
            self.at_peak = self.now.copy()

    def _part(self, tensor: torch.Tensor) -> str:
        """By the code that made it, the innermost first."""
        frame = inspect.currentframe()
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_qualname
            if file == loss.__file__ and "Cross" in name:
                return self._part_of_loss(tensor)
            if file == modeling_gpt2.__file__ and name.endswith("__init__"):
                return "weights"
            if file == modeling_gpt2.__file__ and name.endswith("forward"):
                return f"activations, {name.removesuffix('.forward').removeprefix('GPT2')}"
            if file.startswith(inspect.getsourcefile(torch.optim).removesuffix("__init__.py")):
                return "moments"
            frame = frame.f_back
        return "backward: gradients and temporary tensors"

    def _part_of_loss(self, tensor: torch.Tensor) -> str:
        if tensor.numel() == self.shape.vocab_size * self.shape.n_embd:
            return "loss: the weight's gradient" if tensor.dtype == torch.float32 else "loss: the weight in bfloat16"
        if tensor.ndim == 2 and self.shape.vocab_size <= tensor.shape[0]:
            return "loss: products and copies of the weight's size"
        return "loss: logits" if tensor.ndim == 2 and tensor.shape[1] >= self.shape.vocab_size else "loss: rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, preset="small", steps=3)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parse_shape(parser)
    alive = Alive(options)
    with FakeTensorMode(), alive:
        step = bare_step(GPT2LMHeadModel(GPT2Config(**model_sizes(options))), options)
        ids = torch.zeros(options.batch_size, options.block_size, dtype=torch.long)
        step(ids, ids)
        alive.at_peak = Counter()
        step(ids, ids)
    print(describe(options))
    for part, size in [*alive.at_peak.most_common(), ("together", alive.at_peak.total())]:
        if size >= 1e6:
            print(f"{part:>50}{size / 1e6:>10,.0f} MB")
    print(f"{'without the weights':>50}{(alive.at_peak.total() - alive.at_peak['weights']) / 1e6:>10,.0f} MB")


if __name__ == "__main__":
    main()
