"""All benchmarks of a GPU, one after the other, in less than 20 minutes, into one file under benchmarks/results/.

    python benchmarks/gpu.py           # or make bench-gpu

Needs a CUDA GPU and no network: weights and tokens are random. A benchmark that fails or takes longer than its minutes
is noted in the file with the end of what it printed, and the others go on.
"""

import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from llmkit.errors import UserError, exit_on_user_error
from measuring import machine

HERE = Path(__file__).parent
STEP = "training_step.py --preset 124M --bf16 --compile --steps 30"
# What is measured, the command, and the most minutes that it may take: 19.5 together.
BENCHMARKS = (
    ("124M beside the stock model", f"{STEP} --batch_size 16 --rounds 1 --peers llmkit stock", 3.0),
    ("124M, larger micro-batches", f"{STEP} --batch_size 32 --rounds 1 --peers llmkit", 1.5),
    ("", f"{STEP} --batch_size 64 --rounds 1 --peers llmkit", 1.5),
    ("124M without compile", "training_step.py --preset 124M --bf16 --steps 30 --batch_size 16 --peers llmkit", 1.5),
    ("Trainer's overhead", "trainer_overhead.py --preset 124M --bf16 --compile --batch_size 16 --steps 30", 2.0),
    ("From a plain loop to llmkit", "ladder.py --preset 124M --steps 10 --output /dev/null", 4.0),
    ("Phi-2 QLoRA", "sft.py --phi2 --max_length 1024 --batch_size 1 --checkpointing --rounds 1 --steps 8", 3.0),
    ("Phi-2 preference tuning", "dpo.py --phi2 --steps 6 --rounds 1", 2.0),
    ("Generation", "generation.py --rounds 1", 1.0),
)


def run(command: str, minutes: float) -> str:
    """What a benchmark prints; where it fails or takes too long, that and the end of what it printed."""
    script, *options = command.split()
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / script), *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * minutes,
        )
    except subprocess.TimeoutExpired:
        return f"not finished within {minutes} minutes\n"
    return done.stdout if done.returncode == 0 else f"failed:\n{(done.stdout + done.stderr)[-2000:]}\n"


@exit_on_user_error
def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: on a CPU run make bench")
    day = datetime.now(UTC).date().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    results = HERE / "results" / f"{name}-{day}.md"
    results.parent.mkdir(exist_ok=True)
    parts = [f"# {torch.cuda.get_device_name()}, {day}\n\n{machine('trl', 'peft', 'bitsandbytes')}\n"]
    for title, command, minutes in BENCHMARKS:
        print(command, flush=True)
        start = time.perf_counter()
        text = run(command, minutes)
        seconds = time.perf_counter() - start
        head = f"## {title}\n\n" if title else ""
        parts.append(f"{head}`python benchmarks/{command}` ({seconds:.0f} s)\n\n```\n{text.rstrip()}\n```\n")
        results.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {results}")


if __name__ == "__main__":
    main()
