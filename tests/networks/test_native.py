"""Building the compiled loops: once, privately, never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ossnet.networks import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ossnet"


def test_built_once_into_the_users_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._load() is not None
    files = list(cache.iterdir())
    assert len(files) == 1
    assert cache.stat().st_mode & 0o077 == 0
    before = files[0].stat().st_mtime_ns
    # The second process finds it; the compiler is asked for its version only.
    real = subprocess.run

    def no_build(command: list[str], **options: object) -> object:
        assert "--version" in command
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", no_build)
    assert native._load() is not None
    assert files[0].stat().st_mtime_ns == before


def test_a_folder_that_others_can_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert native._folder() != cache
    assert native._folder().stat().st_mode & 0o077 == 0


def test_without_a_home_it_is_built_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert native._folder() == native._process_folder()


def test_a_broken_library_is_built_again(cache: Path) -> None:
    assert native._load() is not None
    (file,) = cache.iterdir()
    file.unlink()  # the mapped file itself must not change
    file.write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-c", "from ossnet.networks.native import library; print(library() is not None)"],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"
    assert file.stat().st_size > 1000


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSSNET_NATIVE", "0")
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
