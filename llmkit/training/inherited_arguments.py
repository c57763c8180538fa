"""Every argument that is inherited from TrainingArguments: which ones are honoured, and which are refused, and why.

A recipe may give any field of `TrainingArguments`. Each one does what its name says, or is refused with a reason:

    DECISIVE    honoured, and it changes what a run learns: a resumed run has to have the same value
    FREE        honoured, and a resumed run may have another value
    REFUSED     refused with this reason, unless it has its default

PretrainArguments and SFTArguments add what holds for one of them alone. A test compares all of it with the fields of
the installed versions, so that a new field is noticed by its name.
"""

import dataclasses
from collections.abc import Mapping

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from llmkit.errors import UserError

# max_steps and num_train_epochs are among them where the schedule depends on the run's length: `schedules.decisive`.
DECISIVE = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "fp16",
    "learning_rate",
    "max_grad_norm",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "seed",
    "warmup_steps",
    "weight_decay",
}

FREE = {
    # the machine
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "accelerator_config",  # non_blocking alone: see `refuse_accelerator_config`
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "fsdp",
    "fsdp_config",
    "full_determinism",
    "per_device_train_batch_size",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "use_cpu",
    # the length of the run
    "max_steps",
    "num_train_epochs",
    # evaluation
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "load_best_model_at_end",
    "metric_for_best_model",
    "per_device_eval_batch_size",
    # checkpoints
    "output_dir",
    "resume_from_checkpoint",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "use_cache",
    # logs
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "project",
    "report_to",
    "run_name",
    "skip_memory_metrics",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
    # the Hub
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "push_to_hub",
}

_SCHEDULE = "the schedule is stated here as lr_schedule (cosine, linear, wsd, one_cycle or constant) and min_lr_ratio"
_NO_PREDICTIONS = "an evaluation sums the loss and keeps no predictions"
_DATA_ORDER = "the order of the data follows from the seed, so that a resumed run sees the same batches"
_FULL_EVAL = "it rounds the weights themselves, and only in evaluations outside of training; bf16 covers evaluation"
_RENAMED = "it is deprecated: give activation_checkpointing and activation_checkpointing_kwargs"
_NOT_READ = "nothing reads it: a recipe trains, and evaluates where eval_strategy says so"

# The command line's parser makes one of another: "" becomes None, and "no" becomes False.
_NOTHING = (None, False, "", "no", [])

REFUSED = {
    "auto_find_batch_size": "the batch is what the recipe says: give a smaller per_device_train_batch_size",
    "average_tokens_across_devices": "the loss is divided by the targets of all ranks; without this it would be wrong",
    "batch_eval_metrics": _NO_PREDICTIONS,
    "dataloader_in_order": _DATA_ORDER,
    "ddp_static_graph": "torch's static graph does not work together with gradient accumulation",
    "debug": "a loss that is not finite stops the run with its step",
    "deepspeed": "DeepSpeed is not supported: take DDP or FSDP",
    "do_eval": _NOT_READ,
    "do_predict": _NOT_READ,
    "do_train": _NOT_READ,
    "enable_jit_checkpoint": "SIGTERM already saves a checkpoint, on all ranks at the same step",
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "gradient_checkpointing": _RENAMED,
    "gradient_checkpointing_kwargs": _RENAMED,
    "greater_is_better": "every metric of an evaluation is better if it is lower",
    "ignore_data_skip": "a resumed run goes on with the batches that come next",
    "include_for_metrics": _NO_PREDICTIONS,
    "include_num_input_tokens_seen": "tokens are counted and logged without it, at no cost",
    "label_names": _NO_PREDICTIONS,
    "label_smoothing_factor": "the loss never makes the logits that this would smooth",
    "length_column_name": _DATA_ORDER,
    "liger_kernel_config": "Liger's kernels are not supported",
    "local_rank": "the launcher says which rank a process is",
    "logging_nan_inf_filter": "it would hide a loss that is not finite, which stops the run",
    "lr_scheduler_kwargs": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "optim_target_modules": "it is for GaLore and APOLLO, which are not supported",
    "parallelism_config": "ranks are data parallel: take DDP or FSDP",
    "prediction_loss_only": _NO_PREDICTIONS,
    "remove_unused_columns": "which columns reach the model is not a recipe's to say",
    "restore_callback_states_from_checkpoint": "no callback here has a state that it could restore",
    "save_on_each_node": "all ranks write one checkpoint, into an output_dir on a disk that the nodes share",
    "use_liger_kernel": "Liger's kernels are not supported",
}


def refuse_unsupported(args: TrainingArguments, refused: Mapping[str, str]) -> None:
    """Refuse fields that differ from their defaults and would be ignored, or do harm.

    Call it before `TrainingArguments.__post_init__`, which fills fields in.

    Raises:
        UserError: the line names the field and the reason.
    """
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), default_of(field)
        is_default = value == default or (value in _NOTHING and default in _NOTHING)
        if field.name in refused and not is_default:
            raise UserError(f"{field.name}={value} is not supported: {refused[field.name]}; leave it out")


def refuse_accelerator_config(args: TrainingArguments) -> None:
    """Refuse keys of `accelerator_config` that change the batches; call it once that is an AcceleratorConfig."""
    config = args.accelerator_config
    assert isinstance(config, AcceleratorConfig), "TrainingArguments has made it one"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("non_blocking", "use_configured_state") and value != default_of(field):
            raise UserError(
                f"accelerator_config: {field.name}={value} is not supported: it would change the batches; leave it out"
            )


def default_of(field: dataclasses.Field):
    """The default of a dataclass's field; `dataclasses.MISSING` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
