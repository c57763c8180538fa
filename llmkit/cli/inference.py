"""Commands that use what was trained: `generate`, `chat`."""

import argparse
import dataclasses
import sys
import time
import warnings

from llmkit.errors import UserError

SEPARATOR = "-" * 40


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    generate = nouns.add_parser("generate", help="continue a text with a checkpoint", allow_abbrev=False)
    generate.add_argument("checkpoint", help="a run's folder, one of its checkpoints, an adapter, or a model's name")
    generate.add_argument("prompts", nargs="+", metavar="prompt", help="text to continue; - reads it from stdin")
    generate.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    _add_sampling_flags(generate)
    generate.set_defaults(command=_generate)

    chat = nouns.add_parser("chat", help="talk to a fine-tuned checkpoint", allow_abbrev=False)
    chat.add_argument("checkpoint", help="a run's folder, one of its checkpoints, an adapter, or a model's name")
    _add_sampling_flags(chat)
    chat.set_defaults(command=_chat)


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, help="how many at most (default: 128, or what fits the context)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="among so many likeliest only; 0 is all (default: 50)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="among the likeliest of this probability (default: 1)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--seed", type=int, help="makes the samples the same again (default: others each time)")
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="hold the linear layers in 8 or 4 bits")
    parser.add_argument("--base", help="where an adapter's base model is, if it has moved since the training")


def _load(args: argparse.Namespace):
    """Model, tokenizer, and how to sample; flags out of range are refused before anything is loaded."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from llmkit.inference.generation import Sampling, load_for_generation

    names = [field.name for field in dataclasses.fields(Sampling) if field.name in args]
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names
    model, tokenizer = load_for_generation(args.checkpoint, args.quantize, args.base)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return model, tokenizer, sampling


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _generate(args: argparse.Namespace) -> None:
    if args.prompts.count("-") > 1:
        raise UserError("prompt - is given more than once: stdin can be read only once")
    # Without the line break that ends the last line of a file or of `echo`.
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompts]
    model, tokenizer, sampling = _load(args)

    from llmkit.inference.generation import continue_prompts

    single = len(prompts) * args.num_samples == 1
    start = time.perf_counter()
    if single:
        pieces = iter([prompts[0]])  # written with the first piece, once nothing can be refused any more
        found = continue_prompts(
            model, tokenizer, prompts, sampling, write=lambda text: _write(next(pieces, "") + text)
        )
        print(next(pieces, ""))
    else:
        found = continue_prompts(model, tokenizer, prompts, sampling)
        print(f"\n{SEPARATOR}\n".join(each.prompt + each.text for each in found))
    seconds, tokens = time.perf_counter() - start, sum(each.tokens for each in found)
    print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def _chat(args: argparse.Namespace) -> None:
    model, tokenizer, sampling = _load(args)

    from llmkit.inference.chat import Chat
    from llmkit.inference.generation import context_length

    chat = Chat(model, tokenizer, sampling)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history in input())

        print("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if question == "/exit":
            break
        if question == "/reset":
            chat.reset()
        elif question:
            forgotten = chat.forgotten
            try:
                chat.answer(question, AnswerWriter())
                print()
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            if chat.forgotten > forgotten:
                number = chat.forgotten - forgotten
                turns = "the oldest turn was" if number == 1 else f"the {number} oldest turns were"
                note = f"(the context of {context_length(model)} tokens is full: {turns} forgotten)"
                print(note, file=sys.stderr)
    if interactive:
        print()


class AnswerWriter:
    """Writes an answer without the white space that it begins with, since templates leave that to the model."""

    def __init__(self):
        self.begun = False

    def __call__(self, text: str) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        _write(text)
