"""Whether structures belong to a side: a mirrored scan would show them under another one's label, or under none."""

import re

import numpy as np
from jaxtyping import Integer
from scipy.ndimage import find_objects

_WORDS = re.compile(
    r"left|right|(?<![a-z0-9])(?:lt|rt|lh|rh|l|r|sin|dex|dx|sx|links|rechts|linke[nrs]?|rechte[nrs]?|gauche|droite?"
    r"|izquierd[oa]|derech[oa])(?![a-z0-9])"
)


def tells_side(name: str) -> bool:
    """Whether a structure's name says on which side of the body it lies: left_kidney, Kidney L, LKidney, lung-rh.

    Words are told apart by other signs than letters, or by capitals. A name too many is no harm.
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return bool(_WORDS.search(apart.lower()))


def in_pairs(labels: Integer[np.ndarray, "X Y Z"]) -> bool:
    """Whether two structures change places when a scan is mirrored along its first axis, whatever they are called.

    What is labelled is mirrored within its own bounds. A pair lies rather where the other one did than where it was.
    """
    box = find_objects((labels > 0).astype(np.uint8))
    if not box:
        return False
    part = labels[box[0]].astype(np.int64)
    count = int(part.max()) + 1
    # How often each label meets each in the mirror; symmetric.
    met = np.bincount((part * count + part[::-1]).ravel(), minlength=count * count).reshape(count, count)[
        1:, 1:
    ]
    stays = np.diag(met)
    changes = met - np.diag(stays)
    return bool((changes > np.maximum(stays[:, None], stays[None])).any())
