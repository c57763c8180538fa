"""Commands that use what was trained: `generate`, `chat`, `compare`."""

import argparse
import dataclasses
import shutil
import sys
import time
import warnings
from pathlib import Path

from llmkit.cli.arguments import read_stdin
from llmkit.console import shown
from llmkit.errors import UserError
from llmkit.inference.sampling import DEFAULT_NEW_TOKENS, Sampling
from llmkit.paths import checkpoint_path, existing_path

CHECKPOINT = "The folder of a run, of one of its checkpoints or of an adapter, or a model's name on the Hub."
SEPARATOR = "-" * 40
HELP = """\
/help   shows these commands.
/reset  forgets the conversation.
/exit   ends the chat, and so does Ctrl-D.
Ctrl-C  stops an answer."""


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    generate = nouns.add_parser(
        "generate",
        help="Continue a text with a checkpoint.",
        description="Continue one or more texts with a checkpoint. A single text is printed while it is generated.",
        allow_abbrev=False,
    )
    generate.add_argument("checkpoint", help=CHECKPOINT)
    generate.add_argument(
        "prompts", nargs="+", metavar="prompt", help="The text to continue; - reads it from standard input."
    )
    generate.add_argument(
        "--num_samples", type=int, default=1, help="Write this many continuations of each prompt (default: 1)."
    )
    _add_sampling_flags(generate)
    generate.set_defaults(command=_generate)

    chat = nouns.add_parser(
        "chat",
        help="Talk to a fine-tuned checkpoint.",
        description="Talk to a fine-tuned checkpoint in the chat template that was saved with it.",
        allow_abbrev=False,
    )
    chat.add_argument("checkpoint", help=CHECKPOINT)
    chat.add_argument(
        "--system", metavar="TEXT", help="Give the model these instructions, if its chat template has a system prompt."
    )
    _add_sampling_flags(chat)
    chat.set_defaults(command=_chat)

    compare = nouns.add_parser(
        "compare",
        help="Show two models' answers to the same prompts side by side.",
        description="Answer each prompt with two models, always with the likeliest token, and print the answers side "
        "by side. A model with a chat template is asked the prompt as a question; another one continues it.",
        allow_abbrev=False,
    )
    compare.add_argument("first", metavar="A", help=CHECKPOINT)
    compare.add_argument("second", metavar="B", help="The other model, in the same way.")
    compare.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="A text file with one prompt on each line; - reads standard input.",
    )
    compare.add_argument("--output", metavar="FILE", help="Write the answers as a page of HTML into this file too.")
    compare.add_argument(
        "--max_new_tokens",
        type=int,
        default=DEFAULT_NEW_TOKENS,
        help="Cut answers at this many tokens (default: %(default)s).",
    )
    compare.add_argument("--base", help="Load the adapters' base model from here, if it has moved since the training.")
    compare.set_defaults(command=_compare)


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        help="Generate at most this many tokens (default: 128, or what fits the context).",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="Divide the logits by this; 0 always takes the likeliest token (default: 0.8).",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=50,
        help="Choose among this many of the likeliest tokens; 0 allows all of them (default: 50).",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="Choose among the likeliest tokens that together have this probability (default: 1).",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="End the output before this text. The option can be given several times.",
    )
    parser.add_argument(
        "--seed", type=_seed, help="Use this random seed, so that the same samples come again (default: a new one)."
    )
    parser.add_argument(
        "--quantize", choices=("int8", "nf4"), help="Hold the linear layers of a plain checkpoint in 8 or 4 bits."
    )
    parser.add_argument("--base", help="Load an adapter's base model from here, if it has moved since the training.")


def _seed(text: str) -> int:
    """A seed as torch takes it. A ValueError makes argparse refuse the text."""
    if not 0 <= (seed := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"{text}: a seed is a whole number from 0 to {2**64 - 1}")
    return seed


def _sampling(args: argparse.Namespace) -> Sampling:
    """The flags as `Sampling`. Called before torch is imported, so that a mistake is answered at once."""
    return Sampling(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling) if field.name in args}
    )


def _load(args: argparse.Namespace):
    """Model and tokenizer."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from llmkit.inference.generation import load_for_generation
    from llmkit.machine import set_up_generation

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names
    model, tokenizer = load_for_generation(args.checkpoint, args.quantize, args.base)
    set_up_generation(model)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return model, tokenizer


def _write(text: str) -> None:
    print(shown(text), end="", flush=True)


def _generate(args: argparse.Namespace) -> None:
    if args.prompts.count("-") > 1:
        raise UserError("prompt - is given more than once: stdin can be read only once")
    # Without the line break that ends the last line of a file or of `echo`.
    sampling, args.checkpoint = _sampling(args), checkpoint_path(args.checkpoint)
    prompts = [read_stdin().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompts]
    model, tokenizer = _load(args)

    from llmkit.inference.generation import continue_prompts
    from llmkit.model.opening import context_length

    single = len(prompts) * args.num_samples == 1
    start = time.perf_counter()
    if single:
        pieces = iter([prompts[0]])  # written with the first piece, once nothing can be refused any more
        found = continue_prompts(
            model, tokenizer, prompts, sampling, write=lambda text: _write(next(pieces, "") + text)
        )
        _write(next(pieces, "") + "\n")
    else:
        found = continue_prompts(model, tokenizer, prompts, sampling)
        _write(f"\n{SEPARATOR}\n".join(each.prompt + each.text for each in found) + "\n")
    if any(each.slid for each in found):
        note = f"(longer than the context of {context_length(model.config)} tokens: the window slid over the text)"
        print(note, file=sys.stderr)
    seconds, tokens = time.perf_counter() - start, sum(each.tokens for each in found)
    print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def _chat(args: argparse.Namespace) -> None:
    sampling, args.checkpoint = _sampling(args), checkpoint_path(args.checkpoint)
    model, tokenizer = _load(args)

    from llmkit.inference.chat import Chat
    from llmkit.model.opening import context_length

    chat = Chat(model, tokenizer, sampling, args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history in input())

        print("Type /help for the commands.", file=sys.stderr)
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
        if question == "/help":
            print(HELP, file=sys.stderr)
        elif question == "/reset":
            chat.reset()
        elif question.startswith("/") and question[1:].isalpha():
            print(f"error: {question} is not a command: type /help for those there are", file=sys.stderr)
        elif question:
            forgotten = chat.forgotten
            try:
                chat.answer(question, AnswerWriter())
                print()
            except UserError as error:
                print(f"error: {shown(str(error), sys.stderr)}", file=sys.stderr)
            if chat.forgotten > forgotten:
                number = chat.forgotten - forgotten
                turns = "the oldest turn was" if number == 1 else f"the {number} oldest turns were"
                note = f"(the context of {context_length(model.config)} tokens is full: {turns} forgotten)"
                print(note, file=sys.stderr)
    if interactive:
        print()


def _compare(args: argparse.Namespace) -> None:
    Sampling(max_new_tokens=args.max_new_tokens)
    names = [checkpoint_path(name) for name in (args.first, args.second)]
    prompts = _read_prompts(args.prompts)
    output = Path(args.output).expanduser() if args.output else None
    if output and output.is_dir():
        raise UserError(f"output={args.output} is a folder: give a file, such as compared.html")

    from transformers.utils.logging import disable_progress_bar

    from llmkit.data.tokenizer import load_tokenizer
    from llmkit.inference.comparison import answer_all, as_page, as_text
    from llmkit.runs.report import write_page

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names
    for name in names:  # what can be refused is refused before the first model answers
        load_tokenizer(name)
    models = [answer_all(name, prompts, args.max_new_tokens, args.base) for name in names]
    print(shown(as_text(prompts, models, shutil.get_terminal_size((119, 24)).columns)))
    if output:
        write_page(output, as_page(prompts, models))
        print(f"wrote {args.output}")


def _read_prompts(source: str) -> list[str]:
    """The lines of a file, or of standard input, that are not empty.

    Raises:
        UserError: no such file, no text, or no prompt.
    """
    try:
        text = read_stdin() if source == "-" else existing_path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {source} is not a text file in UTF-8 ({error}): give one") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompts: {source} holds no prompt: write one on each line")
    return prompts


class AnswerWriter:
    """Writes an answer without the white space that it begins with, since templates leave that to the model."""

    def __init__(self):
        self.begun = False

    def __call__(self, text: str) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        _write(text)
