"""What a result says of its making."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ossnet.field.provenance import look_of


def one_file(folder: Path) -> tuple[Path, Path]:
    file = folder / "scan.nii"
    file.write_bytes(bytes(1_500_000))
    return file, file


def many_slices(folder: Path) -> tuple[Path, Path]:
    for index in range(200):
        (folder / f"{index:03d}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(20_000))
    return folder, folder / "117.dcm"


@pytest.mark.parametrize("made", [one_file, many_slices])
def test_a_byte_makes_another_scan(made: Callable[[Path], tuple[Path, Path]], tmp_path: Path) -> None:
    """Wherever it lies in it, as where a face is blanked in place."""
    scan, part = made(tmp_path)
    before, content = look_of([scan]), part.read_bytes()
    looks = {before}
    for place in range(len(content) // 15, len(content), len(content) // 7):
        part.write_bytes(content[:place] + b"x" + content[place + 1 :])
        looks.add(look_of([scan]))
    assert len(looks) == 8
    part.write_bytes(content)
    assert look_of([scan]) == before
