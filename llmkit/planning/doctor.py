"""Is this machine set up to train? Each check does the thing itself: compiles a graph, writes a file, asks the Hub."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from llmkit.machine import bf16_is_fast, has_wandb_login, peak_flops, why_not_compile

OK, WARNING, ERROR = "ok", "warning", "error"
ENOUGH_DISK = (
    5e9  # bytes: the quickstart's shards and checkpoints take a fiftieth, GPT-2 124M's three checkpoints this
)
SLOW_DISK = 100e6  # bytes/s: at this speed a checkpoint of GPT-2 124M with its optimizer takes 15 s


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        state: `ok`; `warning`, where training works but something is slower or missing; `error`, where it does not.
        text: what was found.
        fix: what to do about it, if there is something to do.
    """

    name: str
    state: Literal["ok", "warning", "error"]
    text: str
    fix: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """All checks, in the order of the table, each made when it is asked for.

    Args:
        folder: where runs are going to be written; its disk is tried.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        python_and_packages,
        cuda_build,
        gpus,
        cpu,
        compiler,
        four_bit_kernels,
        all_reduce,
        lambda: disk(folder),
        hub,
        wandb_login,
        matrix_products,
    ]
    for check in checks:
        yield from check()


def python_and_packages() -> Iterator[Finding]:
    """Python, and the packages against the versions that pyproject.toml says were tested."""
    yield Finding("python", OK, f"{platform.python_version()}, {platform.platform(terse=True)}")
    outside = []
    for text in importlib.metadata.requires("llmkit") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            outside.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            outside.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if outside:
        fix = "pip install --constraint constraints.txt --editable . installs the versions that were tested"
        yield Finding("packages", WARNING, "; ".join(outside), fix)
    else:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl"))
        yield Finding("packages", OK, f"{shown} and the others are versions that were tested")


def cuda_build() -> Iterator[Finding]:
    """PyTorch's CUDA build against the driver."""
    smi = shutil.which("nvidia-smi")
    if torch.version.cuda is None:
        if smi:
            fix = "install PyTorch's CUDA build"
            yield Finding("cuda", ERROR, f"PyTorch {torch.__version__} cannot use the NVIDIA GPU of this machine", fix)
        else:
            yield Finding("cuda", OK, f"none: PyTorch {torch.__version__} for CPUs, and no NVIDIA driver here")
        return
    if torch.cuda.is_available():
        driver = ""
        if smi:
            query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split("\n")[0]
        yield Finding("cuda", OK, f"{torch.version.cuda}, driver {driver or 'unknown'}")
        return
    try:
        torch.cuda.init()
        reason = "no GPU is visible"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].split("\n")[0]
    fix = "install or update the NVIDIA driver, look at CUDA_VISIBLE_DEVICES, or install PyTorch's CPU build"
    yield Finding("cuda", ERROR, f"PyTorch was built for CUDA {torch.version.cuda} and finds no GPU: {reason}", fix)


def gpus() -> Iterator[Finding]:
    """Each GPU with its memory, and what it is good for."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        peak = peak_flops(torch.device("cuda", index))
        text = (
            f"{properties.name}, {total / 1e9:.0f} GB ({free / 1e9:.0f} GB free), compute capability "
            f"{properties.major}.{properties.minor}, bf16 peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'not known'}"
        )
        # All three came with compute capability 8.0 (Ampere).
        if properties.major >= 8:
            yield Finding(f"gpu {index}", OK, f"{text}, with bf16, TF32 and flash attention")
        else:
            fix = "train with fp16: true, or on a GPU of compute capability 8.0 or more"
            yield Finding(f"gpu {index}", WARNING, f"{text}, without bf16, TF32 and flash attention: slow", fix)


def cpu() -> Iterator[Finding]:
    """Threads and instruction set."""
    capability = torch.backends.cpu.get_cpu_capability()
    text = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}, "
    text += "training runs in bf16" if bf16_is_fast("cpu") else "no bf16 in hardware: training runs in float32"
    yield Finding("cpu", OK, text)
    if (load := os.getloadavg()[0]) > 1.5:
        fix = "end other programs, or wait: threads that wait for each other make training many times slower"
        yield Finding("cpu", WARNING, f"the machine is busy: {load:.1f} processes want to run", fix)
    limits = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    if limits and torch.get_num_threads() < (os.cpu_count() or 1):
        stated = ", ".join(f"{name}={value}" for name, value in limits.items())
        yield Finding("cpu", WARNING, f"{stated} keeps training from using all cores", "unset it for training")


def compiler() -> Iterator[Finding]:
    """torch.compile on a tiny graph, forward and backward, as the first step of a run would do it."""
    if reason := why_not_compile("cuda" if torch.cuda.is_available() else "cpu"):
        fix = "install a C++ compiler (on Debian: apt install g++), or train with torch_compile: false"
        yield Finding("torch.compile", WARNING, f"does not work here ({reason}): runs train without it", fix)
    else:
        yield Finding("torch.compile", OK, "compiled and ran a small graph")


def four_bit_kernels() -> Iterator[Finding]:
    """One NF4 product of bitsandbytes, on the device that would train."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(device)
        output = layer(torch.ones(2, 64, device=device))
    except Exception as error:  # whatever a native library that does not fit raises: the finding is that it fails
        text = f"bitsandbytes does not work on {device} ({' '.join(str(error).split())[:120]})"
        yield Finding("4-bit kernels", WARNING, text, "fine-tune with load_in_4bit: false, or reinstall bitsandbytes")
        return
    state = OK if output.isfinite().all() else ERROR
    text = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}: an NF4 layer runs on {device}"
    yield Finding("4-bit kernels", state, text if state == OK else "an NF4 layer gives values that are not finite")


ALL_REDUCE = """
import torch, torch.distributed as dist, os
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
value = torch.ones(1, device="cuda")
dist.all_reduce(value)
assert value.item() == dist.get_world_size()
dist.destroy_process_group()
"""


def all_reduce() -> Iterator[Finding]:
    """NCCL's sum over all GPUs of this machine, with a process for each."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        yield Finding("ranks", OK, "one device: nothing to communicate")
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "all_reduce.py"
        script.write_text(ALL_REDUCE)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            reason = done.stderr.strip().split("\n")[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = "no answer in 120 s"
    if reason:
        fix = "run it again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 helps where GPUs cannot reach each other directly"
        yield Finding("ranks", ERROR, f"NCCL does not sum over the {count} GPUs ({reason})", fix)
    else:
        yield Finding("ranks", OK, f"NCCL sums over {count} GPUs")


def disk(folder: Path) -> Iterator[Finding]:
    """Free space and the speed of writing 64 MB, in the folder of the runs or the nearest one above it."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(64):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = 64 * len(block) / (time.perf_counter() - start)
    except OSError as error:
        text = f"{folder}: cannot write 64 MB ({error.strerror}), {free / 1e9:.1f} GB free"
        yield Finding("disk", ERROR, text, "free some space, or give --output_dir and --data_dir on another disk")
        return
    text = f"{free / 1e9:.1f} GB free, writes {speed / 1e6:,.0f} MB/s"
    if free < ENOUGH_DISK:
        yield Finding("disk", WARNING, text, "free some space, or save fewer checkpoints (save_total_limit)")
    elif speed < SLOW_DISK:
        yield Finding("disk", WARNING, text, "the run waits while a checkpoint is written: use a faster disk")
    else:
        yield Finding("disk", OK, text)


def hub() -> Iterator[Finding]:
    """Whether the Hub answers, and who is logged in."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    try:
        user = HfApi().whoami()["name"] if get_token() else None
        if user is None:
            # Without a login whoami is refused before it asks, so a connection tells whether the Hub can be reached.
            host, _, port = constants.ENDPOINT.split("//")[-1].split("/")[0].partition(":")
            default = 443 if constants.ENDPOINT.startswith("https") else 80
            socket.create_connection((host, int(port or default)), timeout=10).close()
    except Exception as error:  # no answer: of httpx or httpx2, by the version of huggingface_hub
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
            fix = "log in again: hf auth login"
            yield Finding("hub", WARNING, f"{constants.ENDPOINT} answers, and refuses the token that is set", fix)
            return
        text = f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split())[:100]})"
        yield Finding(
            "hub", WARNING, text, "local files still work; to use files of the Hub, check the network or HF_ENDPOINT"
        )
        return
    if user:
        yield Finding("hub", OK, f"{constants.ENDPOINT} answers, logged in as {user}")
    else:
        yield Finding("hub", WARNING, f"{constants.ENDPOINT} answers, nobody is logged in", "to push: hf auth login")


def wandb_login() -> Iterator[Finding]:
    """Whether report_to: wandb would send what it logs."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        yield Finding("wandb", OK, f"WANDB_MODE={os.environ['WANDB_MODE']}: nothing is sent")
        return
    try:
        is_logged_in = has_wandb_login()
    except ImportError as error:
        yield Finding("wandb", WARNING, f"cannot be imported ({error})", "pip install wandb, or report_to: none")
        return
    if is_logged_in:
        yield Finding("wandb", OK, "logged in")
    else:
        fix = "wandb login; without it, report_to: wandb writes under ./wandb for a later wandb sync"
        yield Finding("wandb", WARNING, "nobody is logged in", fix)


def matrix_products() -> Iterator[Finding]:
    """The measured rate of matrix products in the dtype that training would use, against the device's peak."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if bf16_is_fast(device.type) else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, size, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < until:
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    rate = 2 * size**3 / best
    peak = peak_flops(device) if dtype is torch.bfloat16 else None
    text = f"{rate / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
    text += f", {rate / peak:.0%} of the peak" if peak else ""
    if peak and rate < 0.5 * peak:
        fix = "look for another process on the GPU, a power limit or heat (nvidia-smi)"
        yield Finding("matrix products", WARNING, text, fix)
    else:
        yield Finding("matrix products", OK, text)
