"""The devices that a run is planned for."""

import os
from dataclasses import dataclass

import torch

from llmkit.gpus import GPUS, find_gpu
from llmkit.machine import bf16_is_fast


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for.

    Attributes:
        name: of one device.
        count: the number of devices, with a rank on each.
        device_type: "cpu" or "cuda".
        memory: bytes of one device.
        peak: its bfloat16 peak in FLOP/s, None where it is not known.
    """

    name: str
    count: int
    device_type: str
    memory: float
    peak: float | None

    @classmethod
    def of(cls, gpu: str | None, count: int) -> "Hardware":
        """A GPU by words of its name, such as "H200" or "A100 80GB", or this machine.

        Raises:
            UserError: no GPU or several different ones have that in their name.
        """
        if gpu is None:
            if torch.cuda.is_available():
                name, memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
                return cls(name, count, "cuda", memory, GPUS[name].peak if name in GPUS else None)
            return cls("cpu", count, "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count, None)
        name, each = find_gpu(gpu)
        return cls(name, count, "cuda", each.memory, each.peak)

    @property
    def autocast(self) -> torch.dtype | None:
        """bfloat16 where a run would choose it, else None."""
        fast = self.device_type == "cuda" or bf16_is_fast(self.device_type)
        return torch.bfloat16 if fast else None
