"""The table of a track's results: each variant beside the baseline, over the seeds that both were run with.

    python -m benchmarks.speedrun.table stdlib
    python -m benchmarks.speedrun.table stdlib --tokens 3223552 --markdown

Runs of another length or of other data have a table of their own. Columns:

    seeds         that the variant and the baseline have in common
    loss          validation loss in nats per token at the end, the mean
    bits/byte     the same in bits per byte, with the standard error of the mean over the seeds
    difference    of the bits per byte to the baseline's, the mean of the seeds' differences
    p             of a paired two-sided t-test over the seeds; a difference with p < 0.05 is marked *
    tokens to     the baseline's last loss of the same seed: where the variant's curve crosses it, in a straight line
                  between two evaluations, the mean; "-" where a seed does not get there
    pace          the tokens of the run by these: above 1 the variant learns more from each
    in time       the same in processor time of the steps; it is measured on a machine that others may use as well
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from scipy.stats import ttest_rel

from benchmarks.speedrun.variants import BASELINE, TRACKS, VARIANTS

RESULTS = Path(__file__).with_name("results")
HEAD = ("variant", "seeds", "loss", "bits/byte", "difference", "p", "tokens to", "pace", "in time")


def tokens_to(curve: list[list[float]], loss: float) -> float | None:
    """Where a curve of [tokens, loss] first is as low as `loss`, or None."""
    before = None
    for tokens, here in curve:
        if here <= loss:
            if before is None:
                return tokens
            part = (before[1] - loss) / (before[1] - here)
            return before[0] + part * (tokens - before[0])
        before = tokens, here
    return None


def row(variant: str, runs: dict[int, dict], baseline: dict[int, dict]) -> list[str]:
    """The cells of a variant; runs are given by their seed."""
    seeds = sorted(runs.keys() & baseline.keys())
    ours, theirs = [runs[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    bits = [run["bits_per_byte"] for run in ours]
    error = f" ± {statistics.stdev(bits) / len(bits) ** 0.5:.4f}" if len(bits) > 1 else ""
    cells = [variant, f"{len(seeds)}", f"{statistics.fmean(run['loss'] for run in ours):.4f}"]
    cells.append(f"{statistics.fmean(bits):.4f}{error}")
    if variant == BASELINE:
        return [*cells, "", "", f"{theirs[0]['trained_tokens']:,}", "1.00", "1.00"]
    differences = [run["bits_per_byte"] - other["bits_per_byte"] for run, other in zip(ours, theirs, strict=True)]
    p = ttest_rel(bits, [run["bits_per_byte"] for run in theirs]).pvalue if len(seeds) > 1 else None
    mark = " *" if p is not None and p < 0.05 else ""
    cells += [
        f"{statistics.fmean(differences):+.4f}{mark}",
        "-" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001",
    ]
    reached = [tokens_to(run["curve"], other["loss"]) for run, other in zip(ours, theirs, strict=True)]
    if None in reached:
        return [*cells, "-", "-", "-"]
    tokens = statistics.fmean(reached)
    # Time a token in each, from sums over the seeds; the curve says how many tokens it took.
    per_token = [
        sum(run["processor_seconds"] for run in some) / sum(run["trained_tokens"] for run in some)
        for some in (theirs, ours)
    ]
    pace = statistics.fmean(run["trained_tokens"] for run in theirs) / tokens
    return [*cells, f"{tokens:,.0f}", f"{pace:.2f}", f"{pace * per_token[0] / per_token[1]:.2f}"]


def tables(lines: list[dict]) -> dict[tuple[int, str], list[list[str]]]:
    """Rows by (length of the run in tokens, data), the best first; only where there is a baseline."""
    groups: dict = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        groups[line["tokens"], line["data"]][line["variant"]][line["seed"]] = line
    found = {}
    for key, variants in groups.items():
        if baseline := variants.get(BASELINE):
            rows = [row(name, runs, baseline) for name, runs in variants.items() if runs.keys() & baseline.keys()]
            found[key] = sorted(rows, key=lambda cells: float(cells[3].partition(" ")[0]))
    return found


def text(rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        lines = [[*HEAD, "what"], ["---"] * (len(HEAD) + 1), *([*cells, VARIANTS[cells[0]].what] for cells in rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    rows = [list(HEAD), *rows]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--tokens", type=int, help="only runs of this length")
    parser.add_argument("--markdown", action="store_true", help="for README.md, with what each variant is")
    options = parser.parse_args()
    results = RESULTS / f"{options.track}.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for (tokens, data), rows in sorted(tables(lines).items()):
        if options.tokens in (None, tokens):
            machines = sorted({f"{x['machine']}, torch {x['torch']}" for x in lines if x["tokens"] == tokens})
            print(f"\n{options.track}, {tokens:,} tokens a run, data {data}; {'; '.join(machines)}\n")
            print(text(rows, options.markdown))


if __name__ == "__main__":
    main()
