"""Small runs in processes that are forked from one which has imported everything: how they start, end, and compare.

A rank is a child of this process with the variables that a launcher sets. It must have no threads before it forks, so
whatever works with tokenizers (whose threads do not survive a fork) is done in a child too.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))

import small_run
import small_sft
from llmkit.data.arguments import DataArguments
from llmkit.data.manifest import Manifest
from llmkit.data.prepare import prepare_pretraining_data
from llmkit.training.base_trainer import ExactTrainer
from llmkit.training.checkpoints import checkpoint_to_resume, checkpoints_of
from llmkit.training.ranks import RankLost
from llmkit.training.stopping import listen
from small_run import BLOCK

# Exit statuses of a rank. LOST: it noticed that another one was gone. TOLD: the launcher told it so, with SIGTERM.
FINISHED, FAILED, LOST, TOLD = 0, 3, 4, 128 + signal.SIGTERM
HANG = 60.0  # seconds; nothing here takes a tenth of it
TELL = 2.0  # seconds after a rank's death in which the others are told; torch's launcher does so at once

STEPS = 8
HOW = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "save_total_limit": 2, "learning_rate": 1e-2}
HOW |= {"eval_strategy": "steps", "eval_steps": 4, "sample_tokens": 3, "resume_from_checkpoint": "latest"}
RAMP = {"batch_ramp_start": 4 * BLOCK, "batch_ramp_tokens": 16 * BLOCK}


@dataclass(frozen=True)
class Kind:
    """A kind of run: its name, its number of ranks, and how it differs from others."""

    name: str
    ranks: int = 1
    arguments: dict = field(default_factory=dict, hash=False)
    fine_tuning: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


KINDS = [
    Kind(name, ranks, arguments, fine_tuning)
    for ranks in (1, 2)
    for name, arguments, fine_tuning in (
        ("pretraining, AdamW", {}, False),
        ("pretraining, Muon", {"optim": "muon"}, False),
        ("pretraining, batch ramp", RAMP, False),
        ("fine-tuning, AdamW", {}, True),
    )
]


def make_sources(folder: Path) -> None:
    """A little text for pretraining, and a base for fine-tuning."""
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}\n" for n in range(30)))
    small_sft.make_base(folder / "base")


def prepare(sources: Path, folder: Path) -> tuple[PreTrainedTokenizerBase, Manifest]:
    """The tokenizer and the shards of a pretraining run, made or found."""
    data = DataArguments([str(sources / "*.txt")], data_dir=str(folder / "data"), vocab_size=300)
    data.validation_fraction = 0.1
    return prepare_pretraining_data(data, shard_tokens=4000, num_workers=1)


def make_trainer(kind: Kind, sources: Path, folder: Path, dropout: float = 0.1, **more) -> ExactTrainer:
    """As a recipe does it: prepare the data where that is not done, then the model and its trainer."""
    if kind.fine_tuning:
        how = {"per_device_train_batch_size": 4 // kind.ranks, "sample_prompts": ["3 times 2?"]}
        how = HOW | how | kind.arguments | more
        return small_sft.trainer(str(sources / "base"), folder / "run", lora={"lora_dropout": dropout}, **how)
    tokenizer, manifest = prepare(sources, folder)
    how = {"per_device_train_batch_size": 4, "sample_prompts": ["3 times"]}
    how = HOW | how | kind.arguments | more
    run = small_run.trainer((manifest, tokenizer), folder / "run", **how)
    run.model.config.resid_pdrop = dropout
    return run


def train(kind: Kind, sources: Path, folder: Path) -> None:
    """Start or go on, as a job does that always says `latest`."""
    listen()
    run = make_trainer(kind, sources, folder)
    run.train(resume_from_checkpoint=checkpoint_to_resume(run.args))
    leave(run)


def leave(run: ExactTrainer) -> None:
    """End as recipes do: no rank takes its connections away while another still saves."""
    run.accelerator.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()


def start(work: Callable[[int], None], ranks: int, output: Path | None = None) -> list[int]:
    """Fork ranks that do some work and exit. Returns their processes, which are a group of the first one's number."""
    port = str(_free_port())
    group: list[int] = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            os.setpgid(0, group[0] if group else 0)
            _be_a_rank(partial(work, rank), rank, ranks, port, output)
        os.setpgid(process, group[0] if group else process)
        group.append(process)
    return group


def _be_a_rank(work: Callable[[], None], rank: int, ranks: int, port: str, output: Path | None) -> None:
    file = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    status = FAILED
    try:
        work()
        status = FINISHED
    except RankLost as lost:
        print(lost, flush=True)
        status = LOST
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Ending:
    """How a group of ranks ended.

    Attributes:
        statuses: by process; negative numbers are signals.
        hung: whether one was still there after `HANG` seconds, and was killed.
        seconds: from the call to the last one's end.
        alone: from the first end by a signal to the last end.
    """

    statuses: dict[int, int]
    hung: bool
    seconds: float
    alone: float

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.statuses.values()

    @property
    def finished(self) -> bool:
        return all(status == FINISHED for status in self.statuses.values())

    @property
    def failed(self) -> bool:
        """Whether a rank ended with an error of its own, or none of them should have and one did."""
        allowed = (FINISHED, LOST, TOLD, -signal.SIGKILL) if self.killed else (FINISHED,)
        return self.hung or any(status not in allowed for status in self.statuses.values())


def wait(group: list[int], patience: float = HANG) -> Ending:
    """Until all have ended, which the others are told to if one is killed, as launchers do it."""
    began, first, statuses = time.monotonic(), None, {}
    hung = told = False
    while len(statuses) < len(group):
        for process in group:
            if process not in statuses and (ended := os.waitpid(process, os.WNOHANG))[0]:
                statuses[process] = os.waitstatus_to_exitcode(ended[1])
                if statuses[process] < 0 and first is None:
                    first = time.monotonic()
        now = time.monotonic()
        if first is not None and not told and now - first > TELL:
            told = True
            os.killpg(group[0], signal.SIGTERM)
        if not hung and now - began > patience:
            hung = True
            os.killpg(group[0], signal.SIGKILL)
        time.sleep(0.002)
    now = time.monotonic()
    return Ending(statuses, hung, now - began, now - first if first else 0.0)


def in_child(work: Callable[[], None], output: Path | None = None) -> Ending:
    """Do some work in one forked process, and wait for it."""
    return wait(start(lambda rank: work(), 1, output))


def outcome(kind: Kind, folder: Path) -> tuple:
    """What a run has come to: its shards, weights, the optimizer's state, and what was logged at each step."""
    last = checkpoints_of(folder / "run")[-1]
    weights = load_file(last / ("adapter_model.safetensors" if kind.fine_tuning else "model.safetensors"))
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    logged = [
        (record["step"], key, record[key])
        for record in records
        for key in ("loss", "eval_loss", "sample")
        if key in record
    ]
    shards = {path.name: path.read_bytes() for path in sorted((folder / "data").glob("*.bin"))}
    return weights, moments, logged, shards, last.name


def same(found: tuple, expected: tuple) -> bool:
    """Whether two outcomes are equal to the last bit."""
    weights = found[0].keys() == expected[0].keys() and all(
        torch.equal(found[0][name], weight) for name, weight in expected[0].items()
    )
    moments = found[1].keys() == expected[1].keys() and all(
        torch.equal(torch.as_tensor(found[1][key][name]), torch.as_tensor(value))
        for key, values in expected[1].items()
        for name, value in values.items()
    )
    return weights and moments and found[2:] == expected[2:]
