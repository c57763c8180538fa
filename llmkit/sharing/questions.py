"""What is asked of a checkpoint's consumers, our model's answers, and theirs beside ours.

Logits of some rows of tokens, the likeliest continuation of some prompts, whether a text ends where the end token is
the likeliest, the tokens of some texts, a conversation in the chat template. Everything is computed in float32, so a
bound for the differences follows from that and the model's size.
"""

import inspect
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmkit.model.opening import context_length
from llmkit.sharing.evidence import UNIT, rounding

# A single logit of very many is further off than the usual: by 8 standard deviations once in 1e15.
TAIL = 8
LONGEST_ROW = 1024  # tokens
POSITIONS = 64  # the last of each row, whose logits are compared
NEW_TOKENS = 32
PATIENCE = 1800  # seconds for a consumer: vLLM compiles
PROMPTS = ("def read_file(path):", "import os\n", "The")
CONVERSATION = [{"role": "user", "content": "What does os.path.exists do?"}]
CONVERSATION += [{"role": "assistant", "content": "It tells whether a path exists."}]
CONVERSATION += [{"role": "user", "content": "And for a broken link?"}]
# What splits tokenizers: indentation, other scripts, runs of spaces and lines, apostrophes, digits.
TEXTS = ["def f(x):\n    return [x ** 2 for _ in range(10)]\n", "na\u00efve \u65e5\u672c \U0001f680 e\u0301"]
TEXTS += ["  two  spaces\t\ttabs\r\n\n\n lines ", "It's 3.14 or 1,000,000: we'll SEE \u2014 don't 'quote'"]

# How to get a consumer, for who does not have it. Two of them need other versions than llmkit does.
OWN = "in an environment of its own, whose Python is given with --python"
INSTALL = {
    "transformers": "pip install transformers torch",
    "peft": "pip install peft bitsandbytes transformers torch",
    "onnxruntime": f"pip install onnxruntime optimum-onnx, {OWN}",
    "ctranslate2": "pip install ctranslate2 transformers torch",
    "llama.cpp": "pip install llama-cpp-python transformers torch",
    "vllm": f"pip install vllm, {OWN}",
}
# What a consumer keeps results in while it is told to compute in float32, where that is something else: llama.cpp
# looks GELU up in a table of float16 on CPUs.
KEPT_IN = {"llama.cpp": "float16"}
AGREES, DIFFERS, NOT_OPENED, NOT_INSTALLED = "agrees", "differs", "not opened", "not installed"


@dataclass
class Ours:
    """The questions, and the answers of our model.

    Attributes:
        questions: as `consumers.py` reads them.
        logits: of the last positions of each row, (positions, V).
        greedy: the likeliest continuation of each prompt, without the end token.
        paths: the logits along each of them, from the prompt's last token on, (tokens + 1, V).
        tokens: of each text.
        chat: the conversation in the chat template, if there is one.
        bounds: for the difference of a logit, by the type that results are kept in.
        kept_in: that type, with consumers that have none of their own.
    """

    questions: dict
    logits: list[np.ndarray]
    greedy: list[list[int]]
    paths: list[np.ndarray]
    tokens: list[list[int]]
    chat: str | None
    bounds: dict[str, float]
    kept_in: str


@dataclass
class Row:
    """What a consumer said, beside ours. None is what it was not asked, or cannot tell.

    Attributes:
        logits: the largest difference of a logit; infinity where they are other numbers altogether.
        bound: what rounding explains of it.
    """

    consumer: str
    state: str
    version: str = ""
    logits: float | None = None
    bound: float | None = None
    same_text: bool | None = None
    stops: bool | None = None
    same_tokens: bool | None = None
    same_chat: bool | None = None
    note: str = ""


@torch.no_grad()
def ask_ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, kept_in: str = "float32"
) -> Ours:
    """Make the questions for a checkpoint and answer them with our model."""
    whole = context_length(model.config) if context_length(model.config) < sys.maxsize else LONGEST_ROW
    context, end = min(whole, LONGEST_ROW), tokenizer.eos_token_id
    also = model.generation_config.eos_token_id
    ends = sorted({end, *(also if isinstance(also, list) else [also] if also is not None else [])})
    vocabulary = model.config.vocab_size
    code = tokenizer(inspect.getsource(json), verbose=False)["input_ids"]
    at_random = np.random.default_rng(0).integers(vocabulary, size=context).tolist()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    texts = [*TEXTS, f"one{tokenizer.eos_token}two"]
    chat = chat_ids = None
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
        assert isinstance(chat, str)
        chat_ids = tokenizer(chat)["input_ids"]
        prompts += [chat_ids] if len(chat_ids) < context else []
    prompts = [ids for ids in prompts if 0 < len(ids) < context]
    questions = {
        "checkpoint": str(folder),
        "rows": [code[: max(2, context // 2)], at_random],
        "positions": POSITIONS,
        "prompts": prompts,
        "new_tokens": min(NEW_TOKENS, context - max(map(len, prompts))),
        "end_token": end,
        "ends": ends,
        "texts": texts,
        "chat": CONVERSATION if chat is not None else None,
        "context": whole,
        "vocabulary": vocabulary,
        # Keys and values of two whole texts in float32, in bytes: vLLM takes most of a machine's memory otherwise.
        "cache": 2 * 2 * 4 * whole * model.config.num_hidden_layers * model.config.hidden_size,
    }
    logits = [_logits(model, row)[-POSITIONS:] for row in questions["rows"]]
    greedy = [_greedy(model, ids, questions["new_tokens"], ends) for ids in prompts]
    paths = [_logits(model, ids + more)[len(ids) - 1 :] for ids, more in zip(prompts, greedy, strict=True)]
    largest = max(float(np.abs(each).max()) for each in logits)
    return Ours(
        questions,
        logits,
        greedy,
        paths,
        [tokenizer(text)["input_ids"] for text in texts],
        chat,
        {dtype: TAIL * largest * rounding(model.config, dtype) for dtype in UNIT},
        kept_in,
    )


def _logits(model: PreTrainedModel, row: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu().numpy()


def _greedy(model: PreTrainedModel, prompt: list[int], count: int, ends: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": count, "eos_token_id": ends, "pad_token_id": ends[0]}
    # pyrefly: ignore[not-callable]  torch calls every attribute of a module a tensor or a module
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
    return up_to(made, ends)


def up_to(ids: list[int], ends: list[int]) -> list[int]:
    """The ids before the first end token."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), None)]


def ask(consumer: str, ours: Ours, python: str, work: Path, export: Path, **more: object) -> Row:
    """Let a consumer answer in a process of its own, and compare.

    Args:
        python: the interpreter that runs it.
        work: an empty folder for questions and answers.
        export: an empty folder for the checkpoint in the consumer's own format.
        more: further questions, such as where llama.cpp's checkout is.
    """
    questions = ours.questions | {"export": str(export.absolute()), "llama_cpp": None} | more
    (work / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    script = Path(__file__).with_name("consumers.py")
    # -I: nothing of PYTHONPATH, of this folder, of the user's own packages.
    command = [python, "-I", str(script), consumer, str(work)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (work / "output.txt").open("wb") as output:
        try:
            status = subprocess.run(
                command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=PATIENCE
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"no end after {PATIENCE} s"
    if not (work / "answers.json").exists():
        said = (work / "output.txt").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "it said nothing")
        return Row(consumer, NOT_OPENED, note=f"its process ended with {status}: {last}")
    answers = json.loads((work / "answers.json").read_text(encoding="utf-8"))
    if answers["missing"]:
        lacking = " and ".join(answers["missing"])
        return Row(consumer, NOT_INSTALLED, note=f"{python} lacks {lacking}: {INSTALL[consumer]}")
    if problem := answers.get("refused") or answers.get("failed"):
        return Row(consumer, NOT_OPENED, answers["version"], note=" ".join(problem.split()))
    with np.load(work / "logits.npz") as saved:
        logits = [saved[f"arr_{at}"] for at in range(len(ours.logits))]
    return compare(consumer, answers, logits, ours)


def compare(consumer: str, answers: dict, logits: list[np.ndarray], ours: Ours) -> Row:
    """A consumer's answers beside ours."""
    end, ends = ours.questions["end_token"], ours.questions["ends"]
    bound = ours.bounds[KEPT_IN.get(consumer, ours.kept_in)]
    far = max(_difference(a, b, consumer == "vllm") for a, b in zip(ours.logits, logits, strict=True))
    texts = zip(ours.greedy, answers["greedy"], ours.paths, strict=True)
    row = Row(
        consumer,
        AGREES,
        answers["version"],
        far,
        bound,
        same_text=all(_same_text([*mine, end], [*up_to(made, ends), end], path, bound) for mine, made, path in texts),
        stops=answers["stopped"],
        same_tokens=None if answers["tokens"] is None else answers["tokens"] == ours.tokens,
        same_chat=None if ours.chat is None or answers["chat"] is None else answers["chat"] == ours.chat,
    )
    wrong = [] if far <= bound else ["its logits are others"]
    wrong += ["its greedy text is another"] if row.same_text is False else []
    wrong += ["it does not stop at the end token"] if row.stops is False else []
    wrong += ["its tokens are others"] if row.same_tokens is False else []
    wrong += ["its chat template is another"] if row.same_chat is False else []
    if answers["ends"] is not None and end not in answers["ends"]:
        wrong.append(f"it takes {answers['ends']} for the end token, and not {end}")
    if wrong:
        row.state, row.note = DIFFERS, "; ".join(wrong)
    return row


def _difference(ours: np.ndarray, theirs: np.ndarray, only_some: bool) -> float:
    """The largest difference of a logit; a consumer that says only some of them leaves the others NaN."""
    if ours.shape != theirs.shape or (only_some and np.isnan(theirs).all()):
        return math.inf
    difference = np.abs(ours - theirs)
    far = float(np.nanmax(difference) if only_some else difference.max())
    return far if math.isfinite(far) else math.inf


def _same_text(ours: list[int], theirs: list[int], path: np.ndarray, bound: float) -> bool:
    """Whether two greedy texts, an end token behind each, are the same up to where rounding alone decides."""
    for at, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return bool(path[at].max() - path[at][other] <= 2 * bound)
    return len(ours) == len(theirs)
