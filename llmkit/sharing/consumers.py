"""What opens a checkpoint in another program: a script of its own, which `llmkit verify` runs without llmkit.

    python -I consumers.py CONSUMER FOLDER

`FOLDER/questions.json` says what is asked; the answers are left in `answers.json` and `logits.npz` beside it. The
interpreter may be any with the consumer's packages, so nothing here is imported from llmkit, or from another package
outside of the functions. That llmkit cannot be imported while the consumer works is made sure of and checked.

A consumer's function returns what it found, of which any part may be None where the consumer has no such thing:
`logits`: for each row of token ids, those of its last positions, (positions, V); NaN where it does not say one.
`greedy`: for each prompt, the ids of its likeliest continuation up to the end token.
`stopped`: whether a text ends where the end token is made the likeliest.
`tokens`: the ids of each text. `chat`: a conversation in the chat template. `ends`: the end tokens it reads.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import json
import os
import runpy
import sys
from pathlib import Path

TRIED = 4  # tokens that may follow an end token that does not end the text
TOP = 20  # logits of a position that vLLM is asked for: it makes a Python object of each


class Refused(Exception):
    """Why a consumer that is installed cannot open the checkpoint."""


class WithoutLlmkit:
    """The first finder of modules: it says that there is no llmkit."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "llmkit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def use_transformers(asked):
    """AutoModelForCausalLM and AutoTokenizer, in float32 on the CPU."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked["checkpoint"], trust_remote_code=False, use_safetensors=True
    )
    return as_transformers_does(model.float().eval(), asked)


def use_peft(asked):
    """The adapter on its base, which is loaded as it was trained on, by peft alone."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = Path(asked["checkpoint"]) / "quantization_config.json"
    quantized = transformers.BitsAndBytesConfig(**json.loads(record.read_text())) if record.exists() else None
    base = transformers.AutoModelForCausalLM.from_pretrained(
        asked["base"],
        revision=asked["revision"],
        dtype=quantized.bnb_4bit_compute_dtype if quantized else "auto",
        device_map={"": device},
        quantization_config=quantized,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model = peft.PeftModel.from_pretrained(base, asked["checkpoint"]).eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(asked["checkpoint"])
    return as_transformers_does(model, asked)


def use_onnxruntime(asked):
    """optimum's own export and model on ONNX Runtime."""
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTModelForCausalLM

    main_export(asked["checkpoint"], asked["export"], task="text-generation-with-past", trust_remote_code=False)
    return as_transformers_does(ORTModelForCausalLM.from_pretrained(asked["export"]), asked)


def as_transformers_does(model, asked):
    """The answers of whatever has transformers' interface."""
    import torch
    from transformers import AutoTokenizer, LogitsProcessorList

    tokenizer = AutoTokenizer.from_pretrained(asked["checkpoint"], trust_remote_code=False)

    def make_it_the_likeliest(ids, scores):
        scores[:, asked["end_token"]] = scores.max() + 1
        return scores

    @torch.no_grad()
    def logits(row):
        ids = torch.tensor([row], device=model.device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return output[0, -asked["positions"] :].float().cpu().numpy()

    def generate(row, count, **how):
        ids = torch.tensor([row], device=model.device)
        mask = torch.ones_like(ids)
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=count, **how
        )
        return output[0, len(row) :].tolist()

    stopped = None
    if asked["end_token"] is not None:
        processors = LogitsProcessorList([make_it_the_likeliest])
        stopped = len(generate(asked["prompts"][0], TRIED, logits_processor=processors)) == 1
    ends = model.generation_config.eos_token_id
    return {
        "logits": [logits(row) for row in asked["rows"]],
        "greedy": [generate(row, asked["new_tokens"]) for row in asked["prompts"]],
        "stopped": stopped,
        "ends": ends if isinstance(ends, list) else [ends],
        **of_tokenizer(tokenizer, asked),
    }


def of_tokenizer(tokenizer, asked):
    """Tokens and chat of a tokenizer of transformers."""
    chat = None
    if asked["chat"] and tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(asked["chat"], add_generation_prompt=True, tokenize=False)
    return {"tokens": [tokenizer(text)["input_ids"] for text in asked["texts"]], "chat": chat}


def use_ctranslate2(asked):
    """CTranslate2's own converter, and its engine in float32. It reads tokens, and has no tokenizer."""
    import ctranslate2
    import numpy
    from transformers import AutoTokenizer

    try:
        converter = ctranslate2.converters.TransformersConverter(asked["checkpoint"])
        converter.convert(asked["export"], quantization="float32", force=True)
    except (ValueError, KeyError) as error:
        raise Refused(f"its converter says: {error}") from error
    generator = ctranslate2.Generator(asked["export"], compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(asked["checkpoint"], trust_remote_code=False)

    def generate(row, count, **how):
        tokens = tokenizer.convert_ids_to_tokens(row)
        found = generator.generate_batch(
            [tokens], max_length=count, sampling_topk=1, include_prompt_in_result=False, **how
        )
        return found[0].sequences_ids[0]

    stopped = None
    if (end := asked["end_token"]) is not None:
        others = [[token] for token, at in tokenizer.get_vocab().items() if at != end]
        stopped = generate(asked["prompts"][0], TRIED, suppress_sequences=others) == []
    logits = [numpy.array(generator.forward_batch([tokenizer.convert_ids_to_tokens(row)])) for row in asked["rows"]]
    return {
        "logits": [found[0, -asked["positions"] :] for found in logits],
        "greedy": [generate(row, asked["new_tokens"]) for row in asked["prompts"]],
        "stopped": stopped,
        "tokens": None,
        "chat": None,
        "ends": None,
    }


def use_llama_cpp(asked):
    """llama.cpp's own converter to GGUF, and its Python binding, on the CPU with a float32 cache."""
    import llama_cpp

    if asked["llama_cpp"] is None:
        raise Refused("its converter is needed: give --llama_cpp, the folder of a checkout of llama.cpp")
    converter = Path(asked["llama_cpp"]) / "convert_hf_to_gguf.py"
    file = str(Path(asked["export"]) / "model.gguf")
    sys.path.insert(0, str(converter.parent))
    sys.argv = [str(converter), asked["checkpoint"], "--outfile", file, "--outtype", "f32"]
    try:
        runpy.run_path(str(converter), run_name="__main__")
    except NotImplementedError as error:
        what = "it does not know this tokenizer" if "pre-tokenizer" in str(error) else error
        raise Refused(f"its converter says: {what}") from error
    except SystemExit as error:
        if error.code:
            raise Refused("its converter does not support this checkpoint") from error
    float32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        file, n_ctx=asked["context"], logits_all=True, type_k=float32, type_v=float32, n_gpu_layers=0, verbose=False
    )

    def logits(row):
        llama.reset()
        llama.eval(row)
        return llama.scores[: len(row)][-asked["positions"] :].copy()

    def greedy(row):
        made = itertools.islice(llama.generate(row, temp=0.0, repeat_penalty=1.0), asked["new_tokens"])
        return list(itertools.takewhile(lambda token: token != llama.token_eos(), made))

    stopped = None
    if (end := asked["end_token"]) is not None:
        forced = llama.create_completion(asked["prompts"][0], max_tokens=TRIED, temperature=0.0, logit_bias={end: 1e9})
        stopped = forced["choices"][0]["finish_reason"] == "stop"
    return {
        "logits": [logits(row) for row in asked["rows"]],
        "greedy": [greedy(row) for row in asked["prompts"]],
        "stopped": stopped,
        "tokens": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]],
        "chat": None,
        "ends": [llama.token_eos()],
    }


def use_vllm(asked):
    """vLLM's engine in float32, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import numpy
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked["checkpoint"],
        dtype="float32",
        max_model_len=asked["context"],
        max_logprobs=TOP,
        logprobs_mode="raw_logits",
        kv_cache_memory_bytes=max(asked["cache"], 1 << 26),
        enforce_eager=True,
        trust_remote_code=False,
    )

    def generate(row, **how):
        return llm.generate({"prompt_token_ids": row}, SamplingParams(temperature=0.0, **how), use_tqdm=False)[0]

    def logits(row):
        # It says them of a prompt that leaves room for a token: the last one's are not asked for.
        found = generate(row[:-1], max_tokens=1, prompt_logprobs=TOP).prompt_logprobs[1:] + [None, None]
        array = numpy.full((len(row), asked["vocabulary"]), numpy.nan, numpy.float32)
        for at, entries in enumerate(found):
            for token, entry in (entries or {}).items():
                array[at, token] = entry.logprob
        return array[-asked["positions"] :]

    stopped = None
    if (end := asked["end_token"]) is not None:
        forced = generate(asked["prompts"][0], max_tokens=TRIED, logit_bias={end: 1e4})
        stopped = forced.outputs[0].finish_reason == "stop"
    return {
        "logits": [logits(row) for row in asked["rows"]],
        "greedy": [
            list(generate(row, max_tokens=asked["new_tokens"]).outputs[0].token_ids) for row in asked["prompts"]
        ],
        "stopped": stopped,
        "ends": None,
        **of_tokenizer(llm.get_tokenizer(), asked),
    }


# The function of each consumer, and the modules that have to be there.
CONSUMERS = {
    "transformers": (use_transformers, ("transformers", "torch")),
    "peft": (use_peft, ("peft", "transformers", "torch", "bitsandbytes")),
    "onnxruntime": (use_onnxruntime, ("onnxruntime", "optimum.onnxruntime")),
    "ctranslate2": (use_ctranslate2, ("ctranslate2", "transformers", "torch")),
    "llama.cpp": (use_llama_cpp, ("llama_cpp", "transformers", "torch")),
    "vllm": (use_vllm, ("vllm",)),
}
# What to install for a module whose package has another name.
DISTRIBUTIONS = {"optimum.onnxruntime": "optimum-onnx", "llama_cpp": "llama-cpp-python"}


def is_there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def version_of(module):
    """The name and version of the distribution that it comes from, of which there may be several (onnxruntime-gpu)."""
    (name, *_) = importlib.metadata.packages_distributions().get(module, [module])
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    sys.meta_path.insert(0, WithoutLlmkit)
    use, modules = CONSUMERS[name]
    answers: dict = {"missing": [DISTRIBUTIONS.get(module, module) for module in modules if not is_there(module)]}
    if not answers["missing"]:
        import numpy

        answers["version"] = version_of(modules[0])
        asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        try:
            found: dict = use(asked)
        except Refused as error:
            answers["refused"] = str(error)
        except Exception as error:  # whatever another program raises is what there is to tell
            answers["failed"] = f"{type(error).__name__}: {error}"
        else:
            numpy.savez(folder / "logits.npz", *found.pop("logits"))
            answers.update(found)
    assert not any(module.partition(".")[0] == "llmkit" for module in sys.modules), "the consumer ran without llmkit"
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
