"""Write the plans of the shipped recipes into recipes/README.md.

    python docs/plans.py

Each row is what `llmkit plan RECIPE --gpu ... --gpus ...` says, on the hardware that the row names.
"""

import sys
import tempfile
from pathlib import Path

from llmkit.planning.hardware import Hardware
from llmkit.planning.plan import Assumptions, Plan, amount, amounts
from llmkit.planning.recipe_plan import plan_recipe
from llmkit.recipe_kinds import PRETRAIN, kind_of, parse_recipe, recipe_path

README = Path(__file__).parents[1] / "recipes" / "README.md"
BEGIN, END = "<!-- written by docs/plans.py -->\n", "<!-- end of what docs/plans.py writes -->\n"
# A recipe, the GPU's name and the number of them; None is a CPU, in float32.
PLANNED = [
    ("pretrain_quickstart", None, 1),
    ("sft_qlora_quickstart", None, 1),
    ("dpo_qlora_quickstart", None, 1),
    ("pretrain_characters", None, 1),
    ("pretrain_characters_gpu", "L4", 1),
    ("pretrain_gpt2_124m", "H100 HBM3", 8),
    ("pretrain_gpt2_355m", "H100 HBM3", 8),
    ("pretrain_gpt2_774m", "H100 HBM3", 8),
    ("pretrain_gpt2_1558m", "H100 HBM3", 8),
    ("pretrain_slimpajama", "H100 HBM3", 8),
    ("pretrain_mixture", "H100 HBM3", 8),
    ("pretrain_gpt3_125m", "H100 HBM3", 8),
    ("sft_qlora", "RTX 4090", 1),
    ("dpo_qlora", "RTX 4090", 1),
]
HEADER = """\
| recipe | on | tokens, and per parameter | memory of a step | fits | largest micro-batch | time | on disk |
|---|---|---|---|---|---|---|---|
"""


def plan(name: str, gpu: str | None, gpus: int) -> Plan:
    """The plan of a shipped recipe.

    The base of the fine-tuning quickstarts is taken from the recipe that makes it, and preference tuning is planned
    with a new adapter on the base, for the SFT run that it goes on from has not been made.
    """
    path = recipe_path(name)
    with tempfile.TemporaryDirectory() as folder:
        fields = ["--use_cpu", "true", "--bf16", "false"] if gpu is None else []
        base = "microsoft/phi-2"
        if name in ("sft_qlora_quickstart", "dpo_qlora_quickstart"):
            data, model, _ = parse_recipe(PRETRAIN, [], recipe_path("pretrain_quickstart"))
            config = model.config()
            config.vocab_size, config.bos_token_id, config.eos_token_id = data.vocab_size, 0, 0
            config.save_pretrained(folder)
            base = folder
            fields += ["--model", base] if name == "sft_qlora_quickstart" else []
        if name.startswith("dpo"):
            fields += ["--adapter", "null", "--model", base]
        kind = kind_of(path, fields)
        return plan_recipe(kind, parse_recipe(kind, fields, path), Hardware.of(gpu, gpus), Assumptions())


def row(name: str, gpu: str | None, gpus: int) -> str:
    """A line of the table."""
    found = plan(name, gpu, gpus)
    memory = found.memory
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    parts |= {"DDP": found.communication, "activations": memory.activations, "loss": memory.loss_chunk}
    unknown = "as many as fit" if found.hours else "known from the data"
    tokens = unknown if found.tokens is None else f"{found.tokens:.2e}"
    if found.tokens and found.sizes.trained == found.sizes.parameters:
        tokens += f", {found.tokens / found.sizes.parameters:.0f}"
    unknown = "known from the data" if found.tokens is None else "`--measure` tells"
    time = unknown if found.hours is None else found.duration
    disk = f"{found.checkpoints or ''} checkpoints of {amount(found.checkpoint)}".strip()
    disk += f", shards of {amount(found.shards)}" if found.shards and gpu else ""
    cells = [f"`{name}`", f"{gpus} x {gpu}" if gpu else "a CPU", tokens, f"{amount(found.peak)}: {amounts(parts)}"]
    cells += [found.fits or "no", str(found.largest_micro_batch)] if gpu else ["", ""]
    return f"| {' | '.join([*cells, time, disk])} |\n"


def main() -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    rows = []
    for planned in PLANNED:
        rows.append(row(*planned))
        print(rows[-1], end="", file=sys.stderr)
    README.write_text(before + BEGIN + HEADER + "".join(rows) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
