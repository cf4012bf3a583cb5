"""Colours of structures, the same in every picture."""

PALETTE = (
    "#f2a03d",  # orange
    "#4ea5f0",  # blue
    "#6fce7b",  # green
    "#e8698d",  # pink
    "#b48be8",  # violet
    "#e5d352",  # yellow
    "#5ad0cf",  # cyan
    "#d9825b",  # brown
)
"""Distinct on grey values, and for people who see red and green alike by their lightness too."""

REFERENCE = "#ffffff"
"""The reference in overlays."""


_ROUNDS = ((1.0, 0.0), (0.6, 0.0), (0.5, 0.5))
"""Share of a colour, and of white beside it: as it is, darker, lighter."""


def colour(label: int) -> str:
    """`#rrggbb` of a structure; label 1 is the first, and 24 of them differ."""
    turn, index = divmod(label - 1, len(PALETTE))
    share, white = _ROUNDS[turn % len(_ROUNDS)]
    return "#" + "".join(f"{round(share * part + white * 255):02x}" for part in rgb(PALETTE[index]))


def rgb(text: str) -> tuple[int, int, int]:
    """`#rrggbb` as three numbers 0 … 255."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
