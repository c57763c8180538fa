"""`from llmkit import ...` is enough for users, and costs nothing before."""

import subprocess
import sys

import pytest

import llmkit


def test_every_public_name_is_there_and_is_called_that():
    for name in llmkit.__all__:
        assert getattr(llmkit, name).__name__ == name
    assert {"GPT2Config", "GPT2LMHeadModel", "PretrainArguments", "PretrainTrainer", "TokenWindows"} <= set(
        dir(llmkit)
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmkit.nothing


def test_importing_llmkit_imports_no_library():
    code = "import sys, llmkit; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
