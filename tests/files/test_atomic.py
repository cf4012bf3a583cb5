"""A file appears whole or not at all."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ossnet.errors import InputError, ResourceError
from ossnet.files.atomic import (
    atomic_write,
    clear_unfinished,
    require_folder,
    write_bytes,
    write_json,
    write_text,
)


def test_written_whole_in_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "a.txt"
    write_text(target, "Größe")
    assert target.read_text(encoding="utf-8") == "Größe"
    assert os.listdir(target.parent) == ["a.txt"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o400


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("a.bin")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_any_failure_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")

    def write() -> None:
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path: Path, code: int) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    with pytest.raises(ResourceError, match="disk is full"), atomic_write(target):
        raise OSError(code, "No space left on device")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_at_the_last_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "")


@pytest.mark.skipif(os.name == "nt", reason="needs links and permissions of POSIX")
def test_links_and_permissions_stay(tmp_path: Path) -> None:
    there = tmp_path / "elsewhere" / "a.txt"
    write_text(there, "old")
    there.chmod(0o600)
    link = tmp_path / "a.txt"
    link.symlink_to(there)
    write_text(link, "new")
    assert link.is_symlink()
    assert there.read_text() == "new"
    assert there.stat().st_mode & 0o777 == 0o600


def test_a_link_that_leads_nowhere_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    for place in (tmp_path / "out", tmp_path / "out" / "deep"):
        with pytest.raises(InputError, match="out: is a link to what is not there"):
            require_folder(place)
    (tmp_path / "gone").mkdir()
    require_folder(tmp_path / "out" / "deep")


def test_a_folder_that_may_not_be_read_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with mode 0300; the superuser, who may run this, reads every folder."""
    usual = os.open

    def refusing(path: Any, *options: Any, **more: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *options, **more)

    monkeypatch.setattr(os, "open", refusing)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_json_is_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"µ": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"µ": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"µ": [1, 2.5, None]}


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in (
        ".writing-abcdefgh-a[1].json",
        ".writing-12345678-b.json",
        "deep/.writing-x-a.json",
        "a[1].json",
    ):
        (tmp_path / name).write_text("half")
    clear_unfinished(tmp_path / "a[1].json")
    assert {p.name for p in tmp_path.rglob("*.json")} == {
        ".writing-12345678-b.json",
        ".writing-x-a.json",
        "a[1].json",
    }
    clear_unfinished(tmp_path)
    assert {p.name for p in tmp_path.rglob("*.json")} == {"a[1].json"}


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / ".writing-0123abcd.1.abcdefgh-a.json"
    elsewhere.write_text("half")
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        dead = tmp_path / temporary.name.replace(f".{os.getpid()}.", ".999999999.")
        dead.write_text("half")
        clear_unfinished(tmp_path / "a.json")
        clear_unfinished(tmp_path)
        assert temporary.exists()
        assert not dead.exists()
    assert (tmp_path / "a.json").read_text() == "half"
    # Of another machine it is not known whether its process lives.
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    clear_unfinished(tmp_path / "a.json")
    assert not elsewhere.exists()


def test_what_safetensors_says_of_a_full_disk(tmp_path: Path) -> None:
    """Its errors carry the system's number in their text."""
    (tmp_path / "a").write_text("before")
    with pytest.raises(ResourceError, match="the disk is full"), atomic_write(tmp_path / "a"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (tmp_path / "a").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1
