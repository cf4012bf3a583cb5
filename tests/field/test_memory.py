"""Grants of memory: what users write, what follows, what happens when the machine has less."""

from threading import Thread

import pytest
from tests import tiny

from ossnet.errors import ResourceError, SettingsError, is_out_of_memory
from ossnet.field.memory import MemoryNotice, chunk_for, format_size, halving, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("800m", 800_000_000),
        ("512000000", 512_000_000),
        (4096, 4096),
        (1e6, 10**6),
    ],
)
def test_sizes(text: str | int | float, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "2 GBit", "1 iB", "inf", "2", "512"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SettingsError, match="memory"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (12, 1500, 2_500_000, 3_000_000_000, 4e12)] == [
        "12 B", "1.5 KB", "2.5 MB", "3.0 GB", "4.0 TB",
    ]  # fmt: skip


def test_chunks_fit_the_grant() -> None:
    assert chunk_for(None, 10**9, 10**6, 4096) == 4096
    assert chunk_for(1_000_000, 0, 1000, 4096) == 512
    with pytest.raises(ResourceError, match=r"at least 1\.3 MB"):
        chunk_for(1_000_000, 1_000_000, 1000, 4096)


def test_refused_memory_halves() -> None:
    tried = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return "done"

    with pytest.warns(MemoryNotice):
        assert halving(work, 150, 16) == ("done", 75)
    assert tried == [150, 75]


def test_the_smallest_size_refused_is_an_error_with_advice() -> None:
    def work(size: int) -> None:
        raise MemoryError

    with pytest.raises(ResourceError, match="16 locations"):
        halving(work, 16, 16)


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))

    def work(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        halving(work, 64, 16)


def test_a_grant_is_for_one_label_map_at_a_time() -> None:
    for grant in ("1GB", None):
        field = tiny.model("multiscale").field(tiny.scan(), memory=grant)
        other = Thread(target=field.segment)
        with field._bound.turn:
            other.start()
            other.join(20 if grant is None else 0.3)
            assert other.is_alive() == (grant is not None)
        other.join(20)
        assert not other.is_alive()


def test_what_the_machine_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    field = tiny.model("multiscale").field(tiny.scan())
    field.segment()
    monkeypatch.setattr("ossnet.field.memory.available_memory", lambda: 50_000_000)
    field.segment()
    with pytest.raises(ResourceError, match=r"are needed for a label map of .* voxels, 50.0 MB are free"):
        field.segment(spacing=0.02)
    with pytest.raises(ResourceError, match="are free"):
        tiny.model("multiscale").forecast(tiny.scan(), spacing=0.02)
