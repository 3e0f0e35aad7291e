"""Files and folders appear whole or not at all."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtura.config import UserError
from mixtura.files import (
    cache_entry,
    cache_folder,
    check_empty,
    new_folder,
    package_path,
    replacing,
    write_json,
    write_text,
)


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "a" / "result.json"
    write_text(path, "before\n")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before\n" and os.listdir(path.parent) == ["result.json"]


@contextmanager
def files_of_at_most(size):
    """As a disk that fills up: what is written beyond a size fails within the system's own call."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"0" * 9999), lambda path: save_numbers(path)])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_no_folder(tmp_path, write):
    told = f"'{tmp_path / 'model'}' cannot be written: .* Make room, or name a folder elsewhere"
    with pytest.raises(UserError, match=told), new_folder(tmp_path / "model") as new, files_of_at_most(1000):
        write(new / "model.safetensors")
    assert not os.listdir(tmp_path)


def save_numbers(path):
    save_file({"weight": torch.zeros(9999)}, path)


def test_a_text_keeps_its_line_ends_and_characters(tmp_path):
    write_text(tmp_path / "a.txt", "a\r\nb\n\u2212")
    assert (tmp_path / "a.txt").read_bytes() == b"a\r\nb\n\xe2\x88\x92"


def test_a_number_that_json_has_not_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr("os.fsync", lambda *args: (done.append("sync"), fsync(*args)))
    monkeypatch.setattr("os.replace", lambda *args: (done.append("name"), replace(*args)))
    monkeypatch.setattr("os.rename", lambda *args: (done.append("name"), rename(*args)))
    write_text(tmp_path / "a.txt", "a")
    with new_folder(tmp_path / "model") as new:
        (new / "sub").mkdir()
        for name in ("config.json", "sub/weights"):
            (new / name).write_text("b")
    assert done == ["sync", "name", "sync", "sync", "name"]


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    with new_folder(out) as new:
        (new / "config.json").write_text("{}")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(out) == ["config.json"]
    with pytest.raises(OSError), new_folder(out) as new:
        (new / "other.json").write_text("{}")
    assert os.listdir(tmp_path) == ["model"] and os.listdir(out) == ["config.json"]
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        check_empty(out)


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as new:
        (new / "config.json").write_text("{}")
        raise RuntimeError
    assert not os.listdir(tmp_path)


def test_folders_made_above_one_that_fails_are_removed_and_others_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "mine" / "new" / "model") as new:
        (new / "config.json").write_text("{}")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["mine"] and not os.listdir(tmp_path / "mine")


def test_a_cache_entry_that_another_process_stored_first_stays(tmp_path):
    entry = tmp_path / "cache" / "entry"
    with cache_entry(entry) as slow:
        (slow / "a").write_text("slow")
        with cache_entry(entry) as quick:
            (quick / "a").write_text("quick")
    assert (entry / "a").read_text() == "quick" and os.listdir(entry.parent) == ["entry"]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("MIXTURA_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("MIXTURA_CACHE")
    assert cache_folder() == Path("/two/mixtura")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mixtura"


def test_files_of_packages_are_found_and_missing_ones_are_none():
    assert package_path("mixtura", "config", "arm.py") is not None
    assert package_path("mixtura", "no-such-file") is None
    assert package_path("no_such_package", "file") is None
