"""GPT-2's published sizes, and what a size has to be. Imports no torch: a mistake is answered at once."""

# Radford et al. 2019 (table 2) and Brown et al. 2020 (table 2.1): every size has 64-wide heads but the 1558M one,
# whose 25 heads are 64 wide as well (1600 / 25).
PRESETS: dict[str, dict] = {
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt3-125M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 2048},
}


def preset_sizes(name: str) -> dict:
    """The sizes of a preset.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check_heads(n_embd: int, n_head: int) -> None:
    """Raise a ValueError for a width that cannot be shared out among the heads."""
    if n_embd % n_head:
        nearest = n_head * max(1, round(n_embd / n_head))
        raise ValueError(
            f"n_embd={n_embd} is not divisible by n_head={n_head}: take a multiple of n_head, such as n_embd={nearest}"
        )
