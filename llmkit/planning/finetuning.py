"""The plan of a fine-tuning recipe: the base in 4 bits, adapters on it, and the step of the real model."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedConfig, PreTrainedModel, Trainer
from trl.trainer import add_fused_lm_head
from trl.trainer.utils import use_adapter

from llmkit.errors import UserError
from llmkit.finetuning.adapters import AdapterArguments, check_run, load_base_config
from llmkit.finetuning.arguments import SFTArguments
from llmkit.finetuning.preference_arguments import DPOArguments, PreferenceModelArguments
from llmkit.finetuning.preference_trainer import REFERENCE, answer_log_probs
from llmkit.finetuning.sft_trainer import loss_of_trained
from llmkit.planning.four_bit import quantize_layers
from llmkit.planning.hardware import Hardware
from llmkit.planning.memory import Step
from llmkit.planning.plan import Assumptions, Plan, Sizes, make_plan
from llmkit.training.compatibility import enable_activation_checkpointing

# The configuration of the recipes' default base, as its config.json on the Hub has it, so that a plan needs no
# network. The defaults of PhiConfig are Phi-1's.
KNOWN_BASES = {
    "microsoft/phi-2": PhiConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,  # pyrefly: ignore[unexpected-keyword]  of the rotary embedding's own settings
        resid_pdrop=0.1,
    )
}


def plan_finetuning(
    adapter_args: AdapterArguments, args: SFTArguments | DPOArguments, hardware: Hardware, assumptions: Assumptions
) -> Plan:
    """The plan of a recipe of fine-tuning or preference tuning.

    Nothing but the configuration of base and adapter is read. Every token counts as trained, which is an upper bound.

    Raises:
        UserError: no such base, or what a run would refuse, too.
    """
    if args.activation_offloading:
        raise UserError("activation_offloading: what it leaves on the GPU depends on its timing: plan without it")
    if isinstance(adapter_args, PreferenceModelArguments):
        adapter_args.resolve()
    known = KNOWN_BASES.get(adapter_args.model) if not Path(adapter_args.model).exists() else None
    config = known or load_base_config(adapter_args)
    assert args.max_length is not None, "SFTArguments refuses None"
    check_run(args, config, args.max_length)
    # As `args.compute_dtype` is here; what is planned for another machine is what that one would choose.
    # pyrefly: ignore[bad-argument-type]  DPOArguments has the property of SFTArguments
    dtype = args.compute_dtype if hardware.device_type == "cpu" else hardware.autocast or torch.float32

    def step(micro_batch: int, checkpointing: bool) -> Step:
        if isinstance(args, DPOArguments):
            assert isinstance(adapter_args, PreferenceModelArguments), "of the same recipe"
            return preference_step(config, adapter_args, args, micro_batch, dtype, checkpointing)
        return finetuning_step(config, adapter_args, args, micro_batch, dtype, checkpointing)

    with torch.device("meta"):
        base = _base(config, dtype)
        parameters = base.num_parameters()
        embeddings = base.get_input_embeddings().weight.numel()
        head = base.get_output_embeddings().weight.numel()
        model = get_peft_model(base, replace(adapter_args, quantization="none").lora_config(base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Products: 2 operations a weight forward and 2 backward to the activations; a trained one takes 2 more. Of the
    # embeddings the head alone is one. Attention's two products as `GPT2Config.flops_per_token` has them.
    products = parameters - embeddings + (head if config.tie_word_embeddings else 0)
    attention = 12 * config.num_hidden_layers * config.hidden_size * args.max_length
    flops = 4 * products + 6 * trained + attention
    row = args.max_length
    if isinstance(args, DPOArguments):  # a pair is two texts, and the reference reads them too
        flops, row = flops + 2 * (products + trained) + attention / 3, 2 * args.max_length
    sizes = Sizes(
        parameters=parameters + trained,
        trained=trained,
        row=row,
        step_tokens=args.per_device_train_batch_size * args.gradient_accumulation_steps * row * hardware.count,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        flops_per_token=flops,
    )
    kept = "in 4 bits (NF4)" if adapter_args.quantization == "nf4" else f"in {str(dtype).removeprefix('torch.')}"
    return make_plan(
        f"{config.model_type} of {parameters:,} parameters {kept}, {trained:,} trained in adapters",
        sizes,
        step,
        args,
        hardware,
        assumptions,
        steps_of_epochs=None,  # rows follow from the tokenized conversations
        train_tokens=None,
        shards=None,
        prompts=len(args.sample_prompts) or 2,  # two held-out questions, where none is given
        can_shard=False,  # see `check_run`
    )


def finetuning_step(
    config: PreTrainedConfig,
    adapter_args: AdapterArguments,
    args: SFTArguments,
    micro_batch: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
) -> Step:
    """A step of the base that `config` describes, with adapters, at a micro-batch of so many full rows.

    Args:
        dtype: of the frozen weights that are not quantized, and of the products.
    """
    assert args.max_length is not None
    length = args.max_length

    def build() -> PeftModel:
        return adapted_base(config, adapter_args, args, dtype, checkpointing)

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        # Packed rows are one long row, in which each begins at position 0.
        rows, columns = (1, micro_batch * length) if args.packing else (micro_batch, length)
        inputs = {"input_ids": torch.randint(config.vocab_size, (rows, columns))}
        if args.packing:
            inputs["position_ids"] = torch.arange(length).repeat(micro_batch).unsqueeze(0)
        else:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        trained = tuple(torch.arange(n).repeat(m) for n, m in ((rows, columns - 1), (columns - 1, rows)))
        targets = torch.randint(config.vocab_size, (rows * (columns - 1),))  # of no pattern, as in pretraining
        # pyrefly: ignore[not-callable]  torch calls every attribute of a module a tensor or a module
        head = model.get_output_embeddings()
        return loss_of_trained(model, head, inputs, trained, targets, len(targets))

    return Step(build, loss_of, partial(optimizer_of_adapters, args), args.gradient_accumulation_steps > 1)


def adapted_base(
    config: PreTrainedConfig,
    adapter_args: AdapterArguments,
    args: SFTArguments | DPOArguments,
    dtype: torch.dtype,
    checkpointing: bool,
) -> PeftModel:
    """The base that `config` describes, frozen and in 4 bits if the recipe says so, with float32 adapters on it."""
    base = _base(config, dtype, adapter_args.attn_implementation)
    base.config.use_cache = False
    if adapter_args.quantization == "nf4":
        quantize_layers(base, dtype)
    base.requires_grad_(False)
    lora_config = adapter_args.lora_config(base)
    if checkpointing:  # as Trainer does
        enable_activation_checkpointing(base, args.activation_checkpointing_kwargs)
        base.enable_input_require_grads()
    # PEFT would move adapters that are on a device, and modules of fake tensors cannot be moved.
    with torch.device("meta"):
        model = get_peft_model(base, lora_config)
        if isinstance(adapter_args, PreferenceModelArguments) and adapter_args.adapter:
            model.add_adapter(REFERENCE, lora_config)  # DPOTrainer's frozen copy of the SFT adapter
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # float32, as AdapterTrainer has them
                copy = torch.zeros(parameter.shape)
                setattr(module, name, torch.nn.Parameter(copy, requires_grad=parameter.requires_grad))
    return model.train()


def optimizer_of_adapters(args: SFTArguments | DPOArguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The recipe's, of what is trained."""
    optimizer_class, how = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class([p for p in model.parameters() if p.requires_grad], **how)


def preference_step(
    config: PreTrainedConfig,
    model_args: PreferenceModelArguments,
    args: DPOArguments,
    micro_batch: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
) -> Step:
    """A step of preference tuning at a micro-batch of so many full pairs, through TRL's own head.

    Every token counts as one of an answer, as `finetuning_step` has it.

    Args:
        dtype: as `finetuning_step`'s.
    """
    assert args.max_length is not None
    length = args.max_length

    def build() -> PeftModel:
        model = adapted_base(config, model_args, args, dtype, checkpointing)
        base = model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))  # as DPOTrainer has it
        return model

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        assert isinstance(model, PeftModel), "that of `build`"
        ids = torch.randint(config.vocab_size, (2 * micro_batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
        log_probs = answer_log_probs(model, inputs)
        with torch.no_grad(), use_adapter(model, REFERENCE if REFERENCE in model.peft_config else None):
            reference = answer_log_probs(model, inputs)
        chosen, rejected = (log_probs - reference).chunk(2)
        return -torch.nn.functional.logsigmoid(args.beta * (chosen - rejected)).mean()

    return Step(build, loss_of, partial(optimizer_of_adapters, args), args.gradient_accumulation_steps > 1)


def _base(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str = "sdpa"):
    how = {"dtype": dtype, "attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
