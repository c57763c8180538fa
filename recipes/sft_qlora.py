"""Fine-tune a language model with QLoRA: conversations -> audit -> 4-bit base + adapter -> SFTTrainer -> adapter.

accelerate launch recipes/sft_qlora.py                                            # Phi-2 on openassistant-guanaco
accelerate launch recipes/sft_qlora.py --config recipes/sft_qlora_quickstart.yaml   # offline, on a laptop
accelerate launch recipes/sft_qlora.py --model my/model --data_files chats.jsonl   # any field of the recipe
"""

import sys
import warnings
from functools import partial
from pathlib import Path

from llmkit.console import has_color, shown
from llmkit.errors import exit_on_user_error
from llmkit.recipe_kinds import SFT, parse_recipe


@exit_on_user_error
def main():
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names

    # What to do. Everything that can be refused is refused here, before anything is written; what is wrong in the
    # recipe itself before torch and transformers are imported, which takes seconds.
    default = Path(__file__).with_name("sft_qlora.yaml")
    data_args, adapter_args, args = parse_recipe(SFT, sys.argv[1:], default_config=default)

    import datasets
    from transformers.utils.logging import disable_progress_bar

    from llmkit.finetuning.adapter_trainer import held_out_questions
    from llmkit.finetuning.adapters import (
        check_run,
        dtype_ledger,
        load_base_config,
        load_base_model,
        load_chat_tokenizer,
    )
    from llmkit.finetuning.audit import audit, show_tokens
    from llmkit.finetuning.conversations import encode_all, load_conversations
    from llmkit.finetuning.sft_trainer import ConversationTrainer
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
    check_run(args, load_base_config(adapter_args), args.max_length)
    check_push(args, adapter_args.model)
    say = print if args.process_index == 0 else lambda *_: None

    # Conversations -> tokens and labels, and what would be learned from them.
    tokenizer = load_chat_tokenizer(adapter_args)
    train, validation = load_conversations(data_args)
    train_rows, validation_rows = encode_all(train, tokenizer), encode_all(validation, tokenizer)
    findings = audit(train, train_rows, tokenizer, args.max_length)
    say(shown(findings.table()), "\n\n" + show_tokens(train_rows[0], tokenizer, color=has_color()), "\n")
    findings.check()
    audit(validation, validation_rows, tokenizer, args.max_length).check_held_out()
    args.sample_prompts = args.sample_prompts or held_out_questions(validation.rows, tokenizer, args.max_length)

    # The frozen base in 4 bits, on this rank's device, and an adapter on it.
    model = load_base_model(adapter_args, args.compute_dtype, args.device)
    make = partial(
        ConversationTrainer,
        lora_config=adapter_args.lora_config(model),
        train_rows=train_rows,
        eval_rows=validation_rows,
        tokenizer=tokenizer,
        description=train.description,
        source=(data_args, adapter_args),
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
