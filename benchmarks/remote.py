"""Windows from shards at a URL of this machine (loopback), beside those of the same shards in a folder.

    python benchmarks/remote.py                                  # 12 shards of 10 million tokens, windows of 1,024

Both read every window once, in batches of 64 and in the same order, group by group. `warm` has all shards in its cache
before it begins, `cold` none; both look for what comes next before each batch, as a run does before each step. The
ratio is the folder's time by this one's: `warm` has to be at 0.9 or above.
"""

import argparse
import functools
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from llmkit.data.manifest import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, Shard, Split, load_manifest
from llmkit.data.read_ahead import ReadAhead
from llmkit.data.windows import TokenWindows
from llmkit.files import checksum, write_json
from measuring import print_table

BATCH = 64


def write_shards(folder: Path, number: int, tokens: int) -> None:
    """Shards of random tokens for both splits; that of validation is short."""
    rng, splits = np.random.default_rng(0), {}
    for split, count, length in zip(SPLITS, (number, 1), (tokens, 10_000), strict=True):
        shards = []
        for index in range(count):
            path = folder / f"{split}_{index:05d}.bin"
            rng.integers(0, 50_257, length, dtype=np.uint16).tofile(path)
            shards.append(Shard(path.name, length, documents=1, bytes=length, xxh3_64=checksum(path)))
        splits[split] = Split.of(shards)
    settings = {"format_version": FORMAT_VERSION, "corpus": "random tokens", "tokenizer": "none"}
    manifest = Manifest(folder, "uint16", 50_257, 50_256, "random tokens", settings, splits)
    write_json(folder / MANIFEST, manifest.fields())


def read_all(place: Path | str, options: argparse.Namespace) -> float:
    """Seconds for one pass."""
    manifest = load_manifest(place)
    begun = time.perf_counter()
    windows, held_out = (TokenWindows(manifest, split, options.block_size, options.group) for split in SPLITS)
    order = windows.order(0)
    ahead = ReadAhead([(windows, order, len(windows))], [held_out])
    for start in range(0, len(windows), BATCH):
        stop = min(start + BATCH, len(windows))
        if ahead.want([(start, stop)]):
            while not ahead.wait():
                assert ahead.problem() is None
        windows.__getitems__(order.windows(start, stop))
    ahead.close()
    return time.perf_counter() - begun


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of a shard")
    parser.add_argument("--group", type=int, default=4, help="shards whose windows are shuffled together")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"folder": [], "warm": [], "cold": []}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        shards.mkdir()
        write_shards(shards, options.shards, options.tokens)
        with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards))) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            for _ in range(options.rounds):
                with tempfile.TemporaryDirectory(dir=folder) as home:
                    constants.HF_HOME = home  # where the cache is
                    for name in ("cold", "folder", "warm"):
                        rows[name].append({"seconds": read_all(shards if name == "folder" else url, options)})
            server.shutdown()
    print_table(rows, {"seconds": ".2f"})


if __name__ == "__main__":
    main()
