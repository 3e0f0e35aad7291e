"""Where the cache folder and the files of packages are found."""

from pathlib import Path

from mixtura.config.assets import cache_folder, package_path


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("MIXTURA_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("MIXTURA_CACHE")
    assert cache_folder() == Path("/two/mixtura")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mixtura"


def test_files_of_packages_are_found_and_missing_ones_are_none():
    assert package_path("mixtura", "config", "assets.py") is not None
    assert package_path("mixtura", "no-such-file") is None
    assert package_path("no_such_package", "file") is None
