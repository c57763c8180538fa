"""What torch.compile compiles in a run, counted with a backend that runs its graphs as they are."""

import torch
from torch._dynamo.utils import counters  # private: dynamo counts its graphs nowhere else

from small_run import logged, trainer


def test_a_run_compiles_its_step_once_and_nothing_for_evaluations_and_samples(data, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    watched = {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": ["1 times", "2"], "sample_tokens": 6}
    trainer(data, tmp_path, **compiled, **watched).train()
    assert logged(tmp_path, "eval_loss").keys() == logged(tmp_path, "sample").keys() == {2, 4, 6}
    assert counters["stats"]["unique_graphs"] == 1
