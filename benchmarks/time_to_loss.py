"""Wall time to a loss: nanoGPT's recipe for a CPU beside pretrain_characters.yaml, on the same text and machine.

    python benchmarks/time_to_loss.py --nanogpt ~/nanoGPT --text tinyshakespeare.txt

nanoGPT runs as its README says for a computer without a GPU: `data/shakespeare_char/prepare.py`, then `train.py` with
4 layers, 4 heads, 128 wide, 64 characters of context, batches of 12, 2,000 steps. llmkit runs `llmkit train
pretrain_characters`, a model of the same size, without a launcher as well. Both learn characters, and hold out the
last tenth of the text.

Seconds go from the first command to the end of the last: start-up, tokenizer, evaluations and checkpoints included.
The loss is that of the saved model on the whole of the last tenth, in nats per character, measured in the same way for
both: windows of 64 characters one after another. Each round has another seed. Further arguments go to llmkit's recipe,
as in `--max_steps 240`.
"""

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from loops import definitions
from measuring import add_options, machine, print_table, report, take_turns, use_threads

ROOT = Path(__file__).parents[1]
CONTEXT, HELD_OUT = 64, 0.1
# The command line of nanoGPT's README, for "I only have a macbook".
NANOGPT = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
NANOGPT += "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
# train.py sets its seed itself, and no flag changes it: this runs it with another one.
SEEDED = "import runpy, sys, torch; set_seed = torch.manual_seed; torch.manual_seed = lambda _: set_seed({seed}); "
SEEDED += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run_nanogpt(options: argparse.Namespace, work: Path) -> dict[str, float]:
    checkout = work / "nanoGPT"
    shutil.copytree(options.nanogpt, checkout, ignore=shutil.ignore_patterns(".git", "out*", "*.bin"))
    data = checkout / "data" / "shakespeare_char"
    shutil.copy(options.text, data / "input.txt")  # where prepare.py looks before it downloads
    seeded = ["-c", SEEDED.format(seed=1337 + options.turn)]
    start = time.perf_counter()
    _run([sys.executable, data / "prepare.py"], checkout)
    _run([sys.executable, *seeded, "train.py", "config/train_shakespeare_char.py", *NANOGPT.split()], checkout)
    seconds = time.perf_counter() - start

    script = definitions(checkout / "model.py")
    saved = torch.load(checkout / "out-shakespeare-char" / "ckpt.pt", weights_only=False)
    model = script.GPT(script.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    ids = pickle.loads((data / "meta.pkl").read_bytes())["stoi"]
    # With targets given, it returns the logits of all positions.
    loss = held_out_loss(lambda x: model.eval()(x, x)[0], ids, options.text)
    return {"seconds": seconds, "held-out loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def run_llmkit(options: argparse.Namespace, work: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    from llmkit import GPT2LMHeadModel

    output = work / "run"
    command = [sys.executable, "-m", "llmkit", "train", "pretrain_characters", "--text_files", options.text]
    command += ["--output_dir", output, "--data_dir", work / "data", "--seed", 1337 + options.turn, *options.further]
    start = time.perf_counter()
    _run(command, ROOT)
    seconds = time.perf_counter() - start

    model = GPT2LMHeadModel.from_pretrained(output).eval()
    ids = AutoTokenizer.from_pretrained(output).get_vocab()
    loss = held_out_loss(lambda x: model(x).logits, ids, options.text)
    return {"seconds": seconds, "held-out loss": loss, "parameters": model.num_parameters()}


def _run(command: list, folder: Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


@torch.no_grad()
def held_out_loss(logits: Callable[[torch.Tensor], torch.Tensor], ids: dict[str, int], text: Path) -> float:
    """Nats per character of the end of the text, in windows one after another."""
    characters = text.read_text(encoding="utf-8")
    tail = characters[int(len(characters) * (1 - HELD_OUT)) :]
    tokens = torch.tensor([ids[character] for character in tail])
    windows = (len(tokens) - 1) // CONTEXT
    inputs = tokens[: windows * CONTEXT].view(windows, CONTEXT)
    targets = tokens[1 : windows * CONTEXT + 1].view(windows, CONTEXT)
    total = 0.0
    for x, y in zip(inputs.split(256), targets.split(256), strict=True):
        total += cross_entropy(logits(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=3)
    parser.add_argument("--nanogpt", metavar="DIR", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="such as tinyshakespeare, 1.1 MB")
    parser.add_argument("--peers", nargs="+", choices=("llmkit", "nanoGPT"), default=["llmkit", "nanoGPT"])
    options, options.further = parser.parse_known_args()
    options.text = options.text.resolve()
    use_threads(options.threads)
    os.environ.setdefault("WANDB_MODE", "disabled")
    if options.peer:
        with tempfile.TemporaryDirectory() as work:
            report({"llmkit": run_llmkit, "nanoGPT": run_nanogpt}[options.peer](options, Path(work)))
        return
    print(f"{options.text.name}, held out: the last {HELD_OUT:.0%}; {options.rounds} rounds, a seed each\n{machine()}")
    results = take_turns(options.peers, options.rounds)
    print_table(results, {"seconds": ",.1f", "held-out loss": ".4f", "parameters": ",.0f"})


if __name__ == "__main__":
    main()
