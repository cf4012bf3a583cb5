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


def colour(label: int) -> str:
    """`#rrggbb` of a structure; label 1 is the first."""
    return PALETTE[(label - 1) % len(PALETTE)]


def rgb(text: str) -> tuple[int, int, int]:
    """`#rrggbb` as three numbers 0 … 255."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
