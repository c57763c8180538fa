"""The size of each step's batch: one for all, or growing with the tokens seen (Brown et al. 2020, appendix B)."""

import itertools
from collections.abc import Iterator

import numpy as np


class Batches:
    """The micro-batches of a run, in windows: iterated over, their sizes, `micro_batches` to a step.

    A step's windows are shared out among a fixed number of micro-batches, so that Trainer's accumulation, DDP's
    synchronisation and the place where a resumed run goes on stay what they are. While the batch grows the
    micro-batches are smaller, which a GPU does less efficiently; none is larger than in the full batch. They differ by
    one window at most, and the loss is divided by the targets of the whole step, so how they are cut is not seen in
    the gradient. A step's windows do not depend on the number of ranks.

    The run's tokens are those of `full_steps` full batches, to the last one: the ramp has more steps, not more text.
    The last step, or the last two, take what is left.

    Args:
        full_steps: length of the run in full batches.
        full: windows of a full batch.
        micro_batches: of a step, over all ranks.
        start: windows of the first batch.
        ramp: windows over which the batch grows linearly from `start` to `full`; 0 for none.
    """

    def __init__(self, full_steps: int, full: int, micro_batches: int, start: int, ramp: int = 0):
        assert micro_batches <= start <= full, "an empty micro-batch"
        self.full, self.micro_batches = full, micro_batches
        self.step_sizes = _step_sizes(full_steps * full, full, start, ramp)
        self.ends = np.concatenate([[0], self.step_sizes.cumsum()])  # [s]: windows of the steps before step s

    @property
    def num_steps(self) -> int:
        return len(self.step_sizes)

    def windows_before(self, step: int) -> int:
        """Windows that were trained when `step` steps were done."""
        return int(self.ends[min(step, self.num_steps)])

    def full_batches_before(self, step: int) -> float:
        """The same in full batches, which is what schedules count: `step` itself where there is no ramp."""
        return self.windows_before(step) / self.full

    def __len__(self) -> int:
        return self.num_steps * self.micro_batches

    def __iter__(self) -> Iterator[int]:
        for size, steps in itertools.groupby(self.step_sizes.tolist()):
            step = self._shares(size)
            for _ in steps:
                yield from step

    def _shares(self, size: int) -> list[int]:
        each, more = divmod(size, self.micro_batches)
        return [each + 1] * more + [each] * (self.micro_batches - more)

    def places(self, step: int) -> list[tuple[int, int]]:
        """Of each micro-batch of the 1-based `step`: the first place in the run's order of windows, and the end."""
        ends = itertools.accumulate(
            self._shares(int(self.step_sizes[step - 1])), initial=self.windows_before(step - 1)
        )
        return list(itertools.pairwise(ends))


def _step_sizes(total: int, full: int, start: int, ramp: int) -> np.ndarray:
    """Windows of each step, `total` together."""
    sizes, seen = [], 0
    while seen < min(ramp, total):
        sizes.append(round(start + (full - start) * seen / ramp))
        seen += sizes[-1]
    if seen > total:
        seen -= sizes.pop()
    whole, rest = divmod(total - seen, full)
    sizes += [full] * whole
    if rest:
        rest += sizes.pop()
        sizes += [rest] if rest <= full else [rest - rest // 2, rest // 2]
    return np.array(sizes)
