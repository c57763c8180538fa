"""`transformers serve` on a checkpoint, asked by OpenAI's own client."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from transformers import set_seed

from llmkit import GPT2Config, GPT2LMHeadModel
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.finetuning.conversations import add_chat_template
from llmkit.inference.chat import Chat
from llmkit.inference.generation import Sampling, continue_prompts, load_for_generation

pytestmark = pytest.mark.slow

DEADLINE = 90  # seconds, for a machine that is busy; a quiet one takes 5
GREEDY = Sampling(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A GPT-2 of ours with a chat template, as training and `llmkit merge` leave it."""
    folder = str(tmp_path_factory.mktemp("served"))
    tokenizer = train_bpe_tokenizer(["def read(path):\n    return open(path).read()\n"], 280)
    add_chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def client(checkpoint) -> Iterator[openai.OpenAI]:
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        checkpoint,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        deadline = threading.Timer(DEADLINE, server.kill)  # ends its stderr, and with it the loop below
        deadline.start()
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    break
            else:
                pytest.fail("the server did not start:\n" + "".join(said))
            # What it goes on to say has to be read, or it would wait for that.
            reader = threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True)
            reader.start()
            yield openai.OpenAI(base_url=f"{found[1]}/v1", api_key="unused", max_retries=0, timeout=DEADLINE)
        finally:
            deadline.cancel()
            server.terminate()
            server.wait()


def test_completions(client, checkpoint):
    found = client.completions.create(model=checkpoint, prompt="def read", max_tokens=12, temperature=0)
    expected = continue_prompts(*load_for_generation(checkpoint), ["def read"], GREEDY)[0]
    assert found.choices[0].text == expected.text != ""
    assert found.usage.completion_tokens == expected.tokens == 12


def test_chat_whole_and_streamed(client, checkpoint):
    messages = [{"role": "user", "content": "read?"}]
    asked = {"model": checkpoint, "messages": messages, "max_tokens": 12, "temperature": 0}
    expected = Chat(*load_for_generation(checkpoint), GREEDY).answer("read?", lambda piece: None)
    assert client.chat.completions.create(**asked).choices[0].message.content == expected != ""
    chunks = list(client.chat.completions.create(**asked, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected and len(pieces) > 1
