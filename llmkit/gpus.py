"""GPUs by their names. Imports no torch: a name that is not known is answered at once."""

from dataclasses import dataclass

from llmkit.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """What NVIDIA's datasheet says of a GPU.

    Attributes:
        peak: dense bfloat16 matrix products, in FLOP/s.
        memory: in bytes.
    """

    peak: float
    memory: float


# By the whole name that the driver gives. A name that is not here has no MFU rather than a wrong one: an L40 is no L4,
# and a laptop's GPU is not the desktop's of its number.
GPUS = {
    "NVIDIA GB200": Gpu(2500e12, 186e9),
    "NVIDIA B200": Gpu(2250e12, 180e9),
    "NVIDIA H200": Gpu(989e12, 141e9),
    "NVIDIA GH200 480GB": Gpu(989e12, 96e9),
    "NVIDIA H100 80GB HBM3": Gpu(989e12, 80e9),
    "NVIDIA H100 NVL": Gpu(835e12, 94e9),
    "NVIDIA H100 PCIe": Gpu(756e12, 80e9),
    "NVIDIA A100-SXM4-40GB": Gpu(312e12, 40e9),
    "NVIDIA A100-SXM4-80GB": Gpu(312e12, 80e9),
    "NVIDIA A100-PCIE-40GB": Gpu(312e12, 40e9),
    "NVIDIA A100 80GB PCIe": Gpu(312e12, 80e9),
    "NVIDIA L40S": Gpu(362e12, 48e9),
    "NVIDIA L40": Gpu(181e12, 48e9),
    "NVIDIA L4": Gpu(121e12, 24e9),
    "NVIDIA A10G": Gpu(70e12, 24e9),
    "NVIDIA A10": Gpu(125e12, 24e9),
    "NVIDIA GeForce RTX 5090": Gpu(210e12, 32e9),
    "NVIDIA GeForce RTX 4090": Gpu(165e12, 24e9),
    "NVIDIA GeForce RTX 3090": Gpu(71e12, 24e9),
}


def find_gpu(gpu: str) -> tuple[str, Gpu]:
    """The whole name of a GPU, and what is known of it, by words of its name, such as "H200" or "A100 80GB".

    Raises:
        UserError: no GPU or several different ones have that in their name.
    """
    words = set(gpu.lower().split())
    found = {name: each for name, each in GPUS.items() if words <= set(name.lower().replace("-", " ").split())}
    if not found:
        raise UserError(f"gpu={gpu}: not known; choose from {', '.join(GPUS)}")
    if len(set(found.values())) > 1:
        raise UserError(f"gpu={gpu}: say which one of {', '.join(found)}")
    return next(iter(found.items()))
