"""What the machine is good for, and how to get it."""

import ctypes
import logging
import os
import platform
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from llmkit.console import say
from llmkit.errors import UserError
from llmkit.gpus import GPUS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmkit.training.run_arguments import RunArguments


# Parameters below which text is generated on one thread of a CPU. On two busy cores (load 9 to 14) a model of 1.2
# million wrote 43 tokens/s on one thread and 4.5 on two, which wait for each other without sleeping. The fastest of
# 247 rounds were 549 tokens/s on one thread and 399 on two. From 5.9 million on, two threads were faster.
ONE_THREAD_BELOW = 4_000_000


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def peak_flops(device: torch.device) -> float | None:
    """The device's bfloat16 peak in FLOP/s where it is known, else None."""
    gpu = GPUS.get(device_name(device))
    return gpu.peak if gpu else None


def bf16_is_fast(device_type: str) -> bool:
    """Whether the device has bfloat16 matrix products in hardware, and may use them.

    CPUs with AMX or AVX512_BF16 have them. On two cores of an AMD EPYC with AVX512_BF16, a step was 1.5 (3 layers, 128
    wide) and 1.7 times (6, 384 wide) as fast as in float32. CPUs and GPUs without (T4, V100, RTX 20) emulate them,
    which is slower than float32, on a CPU with AVX2 20 times and more.
    """
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_products = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
        # private: what oneDNN is limited to by ONEDNN_MAX_CPU_ISA
        return has_products and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def set_up_cpu() -> None:
    """Let torch train on this rank's share of the cores, and keep the memory that it frees for the next step."""
    # `accelerate launch` leaves a rank one thread where it is not told how many.
    if torch.get_num_threads() == 1:
        cores = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    # glibc returns large blocks to the system when they are freed, and each step then waits for the same pages to be
    # zeroed again: 10 to 25% of a step's time, measured at 4 x 384 / V 4,096 and 6 x 384 / V 50,257.
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 2**30 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def set_up_generation(model: "PreTrainedModel") -> None:
    """Let a small model generate on one thread: its layers are done before a second one has been called."""
    if model.device.type == "cpu" and model.num_parameters() < ONE_THREAD_BELOW:
        torch.set_num_threads(1)


def why_not_compile(device_type: str, backend: str = "inductor", mode: str | None = None) -> str | None:
    """The reason why torch.compile cannot be used here, or None. Tries it, which takes some seconds the first time.

    Args:
        device_type: "cpu" or "cuda".
        backend, mode: of torch.compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # private: the base class of what torch.compile raises
    from torch._inductor.exc import InductorError  # private: likewise

    def graph(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x).sum()

    try:
        x = torch.ones(16, 16, device=device_type, requires_grad=True)
        torch.compile(graph, backend=backend, mode=mode)(x).backward()
    except (TorchDynamoException, InductorError, RuntimeError, OSError, ImportError) as error:
        return " ".join(str(error).split())[:120] or type(error).__name__
    finally:
        torch._dynamo.reset()  # private: forgets the graph, whose guards would stay with the run's
    return None


def settle_compile(args: "RunArguments") -> None:
    """Train without torch.compile where it does not work and was llmkit's own choice. All ranks call it together.

    Raises:
        UserError: it does not work on some rank, and the recipe asks for it.
    """
    if not args.torch_compile:
        return
    reason = why_not_compile(args.device.type, args.torch_compile_backend or "inductor", args.torch_compile_mode)
    reasons = [each for each in gather_object([reason]) if each]
    if not reasons:
        return
    if not args.compiles_by_default:
        raise UserError(
            f"torch_compile: true, and torch.compile does not work here ({reasons[0]}): install a C++ compiler (on "
            "Debian: apt install g++), or set torch_compile: false"
        )
    args.torch_compile, args.torch_compile_backend = False, None
    if args.process_index == 0:
        say(f"warning: torch.compile does not work here, so the run goes on without it ({reasons[0]})")


def set_up(args: "RunArguments") -> None:
    """Set up this process for a training run, once, in a recipe's `main()`.

    Arguments and trainers leave the process alone; what a run wants of it is all here: threads and memory of a CPU,
    torch.compile and its limits, a warning that does not apply, and wandb without a login.

    Raises:
        UserError: the recipe asks for torch.compile, which does not work here.
    """
    if args.use_cpu:
        set_up_cpu()
    settle_compile(args)
    import torch._dynamo.config

    # private: the limit can be raised in no other way. Each size of micro-batch of a growing batch is a graph of its
    # own, and after 8 dynamo would go on without graphs.
    torch._dynamo.config.recompile_limit = 8 + args.per_device_train_batch_size
    # The end tokens within packed rows are no padding, as transformers takes them to be where both are one token.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "passing in an `attention_mask`" not in str(record.msg)
    )
    if "wandb" in (args.report_to or ()):
        set_up_wandb()


def set_up_wandb() -> None:
    """Let wandb work without a login: it then writes under ./wandb for a later `wandb sync`, in place of an error."""
    if "WANDB_MODE" in os.environ:
        return
    if not has_wandb_login():
        os.environ["WANDB_MODE"] = "offline"


def has_wandb_login() -> bool:
    """Whether wandb would send what it logs. It is asked for nothing, and forgets what it read to answer."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    finally:
        wandb.teardown()  # it reads its environment once, and has just done so
