import subprocess
import sys
import sysconfig
from pathlib import Path

from llmkit.data.sample_data import stdlib_sources


def test_standard_library_is_a_corpus_of_some_size_without_tests_and_tables():
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in stdlib_sources()]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"})
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert sum(path.stat().st_size for path in stdlib_sources()) > 5_000_000


def test_every_source_is_text_and_none_is_empty():
    assert all(path.read_bytes().decode() for path in stdlib_sources())


def test_order_is_the_same_in_another_process():
    code = "from llmkit.data.sample_data import stdlib_sources; print(*stdlib_sources(), sep='\\n')"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert other.stdout.splitlines() == [str(path) for path in stdlib_sources()]
