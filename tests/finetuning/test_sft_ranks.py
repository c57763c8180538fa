"""One launch of two ranks: each drops out units of its own, from rows in one order, and resumes so."""

from test_adapters import bases, trainer  # noqa: F401, a fixture

from ranks import on_ranks


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
    ranks = on_ranks(2, train_with_dropout, bases["gpt2"], str(tmp_path / "run"))
    (mask, rows, *runs), (other_mask, other_rows, *_) = ranks
    assert mask != other_mask
    assert runs[0] == runs[1] and len(runs[0]) == 4
    seen = [tuple(row[:12]) for batch in (*rows[:4], *other_rows[:4]) for row in batch]
    assert len(set(seen)) == len(seen), "a row was read by both ranks"
