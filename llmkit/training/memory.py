"""What is said where memory does not suffice."""

import torch
from transformers import TrainingArguments


def out_of_memory(error: Exception, args: TrainingArguments) -> str | None:
    """The line to print if an error is that of memory that is not there, on a GPU or a CPU, else None."""
    # torch's CPU allocator raises a plain RuntimeError.
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    size = args.per_device_train_batch_size
    what = f"memory does not suffice for per_device_train_batch_size={size}"
    if size == 1:
        return f"{what}: take activation_checkpointing: true, a shorter block_size or max_length, or a smaller model"
    # Half of it divides whatever it did, so accumulation makes up for it and the batch of a step stays the same. How
    # much more a step wanted is not known here: `plan` runs one without content.
    half = size // 2 if size % 2 == 0 else 1
    return (
        f"{what}: take {half}, with which a step trains on the same text in more parts; llmkit plan says which is the "
        "largest that fits"
    )
