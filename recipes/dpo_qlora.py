"""Preference tuning with QLoRA: preference pairs -> audit -> 4-bit base + SFT adapter -> DPOTrainer -> adapter.

accelerate launch recipes/dpo_qlora.py                                            # Phi-2's adapter on UltraFeedback
accelerate launch recipes/dpo_qlora.py --config recipes/dpo_qlora_quickstart.yaml   # offline, on a laptop
accelerate launch recipes/dpo_qlora.py --adapter my/adapter --data_files pairs.jsonl   # any field of the recipe
"""

import sys
import warnings
from functools import partial
from pathlib import Path

from llmkit.console import has_color, shown
from llmkit.errors import exit_on_user_error
from llmkit.recipe_kinds import DPO, parse_recipe


@exit_on_user_error
def main():
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names

    # What to do. Everything that can be refused is refused here, before anything is written; what is wrong in the
    # recipe itself before torch and transformers are imported, which takes seconds.
    default = Path(__file__).with_name("dpo_qlora.yaml")
    data_args, model_args, args = parse_recipe(DPO, sys.argv[1:], default_config=default)

    import datasets
    from transformers.utils.logging import disable_progress_bar

    from llmkit.finetuning.adapter_trainer import held_out_questions
    from llmkit.finetuning.adapters import check_run, dtype_ledger, load_base_config, load_base_model
    from llmkit.finetuning.preference_audit import audit_pairs, show_pair
    from llmkit.finetuning.preference_trainer import PreferenceTrainer
    from llmkit.finetuning.preferences import encode_pairs, load_pairs
    from llmkit.machine import set_up
    from llmkit.sharing.hub import check_push
    from llmkit.training.budget import fix_length
    from llmkit.training.checkpoints import checkpoint_to_resume
    from llmkit.training.stopping import listen

    listen()  # to signals: they save and stop
    disable_progress_bar()  # of transformers and datasets; the training has its own
    datasets.disable_progress_bars()
    set_up(args)
    resume_from = checkpoint_to_resume(args)
    model_args.resolve()
    check_run(args, load_base_config(model_args), args.max_length)
    check_push(args, model_args.model)
    say = print if args.process_index == 0 else lambda *_: None

    # Preference pairs -> tokens, and what would be learned from them.
    tokenizer = model_args.load_tokenizer()
    train, validation = load_pairs(data_args)
    train_rows, validation_rows = encode_pairs(train, tokenizer), encode_pairs(validation, tokenizer)
    findings = audit_pairs(train, train_rows, tokenizer, args.max_length)
    say(shown(findings.table()), "\n\n" + show_pair(train_rows[0], tokenizer, color=has_color()), "\n")
    findings.check()
    audit_pairs(validation, validation_rows, tokenizer, args.max_length).check()
    prompts = [pair["prompt"] for pair in validation.rows]
    args.sample_prompts = args.sample_prompts or held_out_questions(prompts, tokenizer, args.max_length)

    # The frozen base in 4 bits, on this rank's device, with the SFT adapter on it, or with a new one.
    model = load_base_model(model_args, args.compute_dtype, args.device)
    lora_config = None if model_args.adapter else model_args.lora_config(model)
    model = model_args.put_adapter(model) if model_args.adapter else model
    make = partial(
        PreferenceTrainer,
        lora_config=lora_config,
        train_rows=train_rows,
        eval_rows=validation_rows,
        tokenizer=tokenizer,
        description=train.description,
        source=(data_args, model_args),
    )
    fix_length(make, model, args, resume_from)  # with train_minutes: so many steps as fit, as measured here
    trainer = make(model, args)
    say(dtype_ledger(trainer.model))

    trainer.train(resume_from_checkpoint=resume_from)
    if args.lr_schedule == "range_test":  # of `llmkit lr-find`: there is no model to keep
        return
    if trainer.stopped:
        trainer.write_report()
        say(trainer.stopped)
        return

    # The adapter and a report in the run's folder itself, and on the Hub with `push_to_hub: true`.
    trainer.evaluate()
    trainer.save_model()
    trainer.write_report()
    say(f"saved {args.output_dir}; `llmkit merge {args.output_dir} FOLDER` makes a plain checkpoint of it")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    trainer.push_to_hub()  # last, when no other rank waits for it


if __name__ == "__main__":
    main()
