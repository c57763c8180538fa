"""Pretrain a GPT-2 from scratch: text -> tokenizer -> token shards -> Trainer -> a stock checkpoint.

accelerate launch recipes/pretrain.py                               # the quickstart: offline, on a laptop
accelerate launch recipes/pretrain.py --config recipes/pretrain_gpt2_124m.yaml
accelerate launch recipes/pretrain.py --text_files 'books/*.txt'    # any field of the recipe, over its file
"""

import sys
from functools import partial
from pathlib import Path

from llmkit.console import shown
from llmkit.errors import exit_on_user_error
from llmkit.recipe_kinds import PRETRAIN, parse_recipe


@exit_on_user_error
def main():
    # What to do. Everything that can be refused is refused here, before anything is written; what is wrong in the
    # recipe itself before torch and transformers are imported, which takes seconds.
    default = Path(__file__).with_name("pretrain_quickstart.yaml")
    data_args, model_args, args = parse_recipe(PRETRAIN, sys.argv[1:], default_config=default)

    from transformers.utils.logging import disable_progress_bar

    from llmkit.data.prepare import prepare_windows
    from llmkit.machine import set_up
    from llmkit.sharing.hub import check_push
    from llmkit.training.budget import fix_length
    from llmkit.training.checkpoints import checkpoint_to_resume
    from llmkit.training.pretrain_trainer import PretrainTrainer
    from llmkit.training.stopping import listen

    listen()  # to signals: they save and stop
    disable_progress_bar()  # of transformers' file reading and writing; the training has its own
    set_up(args)  # threads, memory, wandb: what a run wants of its process
    config = model_args.config()
    block_size = model_args.block_size or config.n_positions
    args.set_accumulation(block_size)
    resume_from = checkpoint_to_resume(args)
    check_push(args)

    # Text -> tokenizer -> token shards, where they are not there yet. Of several ranks one works, the others wait.
    tokenizer, train_windows, validation_windows = prepare_windows(data_args, block_size, args.max_steps)
    args.sample_prompts = args.sample_prompts or validation_windows.beginnings(tokenizer)

    # The model: the same weights on every rank, whatever happened before.
    model = model_args.model(tokenizer, args.seed)
    tokenizer.model_max_length = config.n_positions

    make = partial(
        PretrainTrainer,
        train_dataset=train_windows,
        eval_dataset=validation_windows,
        processing_class=tokenizer,
        source=(data_args, model_args),
    )
    fix_length(make, model, args, resume_from)  # with train_minutes: so many steps as fit, as measured here
    trainer = make(model, args)
    trainer.accelerator.print(shown(trainer.summary()))
    trainer.train(resume_from_checkpoint=resume_from)
    if args.lr_schedule == "range_test":  # of `llmkit lr-find`: there is no model to keep
        return
    if trainer.stopped:
        trainer.write_report()
        trainer.accelerator.print(trainer.stopped)
        return

    # A checkpoint and a report in the run's folder itself, and on the Hub with `push_to_hub: true`.
    trainer.save_model()
    trainer.evaluate()
    trainer.write_report()
    trainer.accelerator.print(f"saved {args.output_dir}, with its report.html")
    trainer.accelerator.wait_for_everyone()  # no rank takes its connections away while another still saves
    trainer.accelerator.end_training()
    trainer.push_to_hub()  # last, when no other rank waits for it


if __name__ == "__main__":
    main()
