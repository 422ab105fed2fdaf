"""Files are whole or not there, and a failure leaves nothing beside them."""

import errno
import os
import socket
import subprocess

import pytest

from experiments import files


def whole_file(path):
    files.write_text(path, "whole, and with an umlaut: ä\n")


def folder_of_files(path):
    with files.beside(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "part").write_text("one")


WRITERS = pytest.mark.parametrize("write", [whole_file, folder_of_files])


def disk_full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@WRITERS
def test_what_is_written_is_there_and_nothing_beside_it(write, tmp_path):
    write(tmp_path / "deep" / "name")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["name"]


@WRITERS
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_what_was_there(write, operation, tmp_path, monkeypatch):
    (tmp_path / "name").write_text("before")
    monkeypatch.setattr(os, operation, disk_full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "name")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"name": "before"}


def test_two_writers_of_one_file_have_two_names(tmp_path):
    path = tmp_path / "name.json"
    with files.beside(path) as one, files.beside(path) as other:
        assert one != other
        assert one.suffix == other.suffix == ".json"  # Keras and matplotlib go by it
        one.write_text("1")
        other.write_text("2")
    assert files.read_object(path) is None  # a number is no object
    assert path.read_text() == "1"  # the last one to be renamed


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[1]"])
def test_a_damaged_file_holds_no_object(content, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    assert files.read_object(path) is None


def test_a_whole_one_does(tmp_path):
    files.write_json(tmp_path / "whole.json", {"a": float("nan"), "b": [1]})
    assert str(files.read_object(tmp_path / "whole.json")) == "{'a': nan, 'b': [1]}"


def test_what_killed_writers_left_is_removed_by_name(tmp_path):
    folder = files.unfinished_name(tmp_path / "backup")
    folder.mkdir()
    (folder / "part").write_text("half")
    files.unfinished_name(tmp_path / "one.json").write_text("half")
    files.unfinished_name(tmp_path / "two.json").write_text("another process is at it")
    (tmp_path / "one.json").write_text("whole")
    files.discard_unfinished(tmp_path, "one.json")
    files.discard_unfinished(tmp_path, "backup")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith("-two.json")) == ["one.json"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_of_a_file_is_gone_once_it_is_written(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    left = {
        f".unfinished-{host}-{dead.pid}-0123abcd-name": False,
        f".unfinished-{host}-{os.getpid()}-0123abcd-name": False,  # before a restart of the container
        f".unfinished-{host}-{os.getppid()}-0123abcd-name": True,
        f".unfinished-{host}-{dead.pid}-0123abcd-another-name": True,
        f".unfinished-{host}-{dead.pid}-99-0123abcd-name": True,  # of a host with such a name
        f".unfinished-another-{dead.pid}-0123abcd-name": True,
    }
    for name in left:
        (tmp_path / name).mkdir()
    with files.beside(tmp_path / "name") as unfinished:
        unfinished.mkdir()
        with files.beside(tmp_path / "name") as second:  # what is being written stays
            assert unfinished.exists()
            second.mkdir()
        os.replace(tmp_path / "name", tmp_path / "other")
    stay = {name for name, stays in left.items() if stays}
    assert {path.name for path in tmp_path.iterdir()} == {"name", "other", *stay}


def test_a_folder_is_removed_at_once(tmp_path, monkeypatch):
    folder_of_files(tmp_path / "folder")
    monkeypatch.setattr(files.shutil, "rmtree", disk_full)  # as if killed there
    with pytest.raises(OSError, match="No space left"):
        files.remove(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
