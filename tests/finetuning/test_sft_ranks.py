"""One launch of two ranks: each drops out units of its own, from rows in one order, and resumes so."""

import json
import subprocess
import sys
from pathlib import Path

from test_adapters import bases, trainer  # noqa: F401, a fixture

SCRIPT = """
import json, os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_sft_ranks import train_with_dropout
found = train_with_dropout(sys.argv[2], sys.argv[3])
with open(f"{sys.argv[3]}/rank_{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


def note(found: list, module, values) -> None:
    """What a hook sees in training. (What a hook returns takes the place of the module's output.)"""
    if module.training:
        found.append(values.tolist())


def train_with_dropout(base: str, output_dir: str) -> list:
    """What this process drops out first, the rows that it reads, and the losses of a run and of its last steps."""
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "packing": False}
    how |= {"per_device_train_batch_size": 2, "activation_checkpointing": False, "ddp_backend": "gloo"}
    masks, rows, runs = [], [], []
    for checkpoint in (None, f"{output_dir}/checkpoint-2"):
        run = trainer(base, output_dir, **how, resume_from_checkpoint=checkpoint)
        dropout = next(module for name, module in run.model.named_modules() if name.endswith("lora_dropout.default"))
        dropout.register_forward_hook(lambda module, args, out: note(masks, module, out == 0))
        embedding = run.model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: note(rows, module, args[0]))
        run.train(resume_from_checkpoint=checkpoint)
        runs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    return [masks[0], rows[:8], *runs]


def test_ranks_drop_out_other_units_of_rows_in_one_order(bases, tmp_path):  # noqa: F811
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", tmp_path / "script.py"]
    command += [Path(__file__).parent, bases["gpt2"], tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [json.loads((tmp_path / f"run/rank_{rank}.json").read_text()) for rank in range(2)]
    (mask, rows, *runs), (other_mask, other_rows, *_) = ranks
    assert mask != other_mask
    assert runs[0] == runs[1] and len(runs[0]) == 4
    seen = [tuple(row[:12]) for batch in (*rows[:4], *other_rows[:4]) for row in batch]
    assert len(set(seen)) == len(seen), "a row was read by both ranks"
