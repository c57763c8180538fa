"""Memory that is not there is one line with a size to take."""

import pytest
import torch

from llmkit.errors import UserError
from small_run import trainer


@pytest.mark.parametrize("size, advice", [(8, "take 4, with which"), (1, "take activation_checkpointing: true")])
def test_a_batch_that_memory_does_not_hold(data, tmp_path, size, advice):
    run = trainer(data, tmp_path, per_device_train_batch_size=size)

    def forward(*args, **kwargs):
        return torch.empty(1 << 60)  # what the allocator says of an exabyte

    run.model.forward = forward
    with pytest.raises(UserError, match=f"does not suffice for per_device_train_batch_size={size}: {advice}"):
        run.train()
