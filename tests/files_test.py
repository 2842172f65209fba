"""Files are there wholly or not at all, and hold JSON that any program can read."""

import errno
import json
import pathlib

import numpy as np
import pytest

from dynamical_jax import files
from dynamical_jax.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestReplacing:
    def test_what_was_there_stays_until_all_is_written(self, tmp_path):
        path = tmp_path / "table.csv"
        path.write_text("old")
        with files.replacing(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
            assert partial.parent == path.parent  # Else it could not be renamed at one stroke.
        assert path.read_text() == "new"
        assert names(tmp_path) == ["table.csv"]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_nothing_is_left_of_what_fails(self, tmp_path, error):
        path = tmp_path / "table.csv"
        path.write_text("old")

        def fail():
            with files.replacing(path) as partial:
                partial.write_text("half of the n")
                raise error

        with pytest.raises(error):
            fail()
        assert path.read_text() == "old"
        assert names(tmp_path) == ["table.csv"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [(None, "table.csv"), ("table.csv.partial", "{0}/table.csv"), ("other.csv", "other.csv")],
)
def test_an_error_names_the_file_that_was_meant(tmp_path, monkeypatch, named, expected):
    monkeypatch.chdir(tmp_path)
    path, helper = pathlib.Path("table.csv"), pathlib.Path("table.csv.partial")
    with pytest.raises(OSError, match="denied") as caught, files.naming(path, helper):
        raise OSError(errno.EACCES, "Permission denied", named)
    assert caught.value.filename == expected.format(tmp_path)


def test_a_folder_in_which_no_file_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write (.*)/file/x.csv: no .* folder \1/file \("):
        files.check_writable(tmp_path / "file" / "x.csv")
    files.check_writable(tmp_path / "new" / "er" / "x.csv")
    assert names(tmp_path / "new" / "er") == []


def test_write_keeps_the_ends_of_lines(tmp_path):
    files.write(tmp_path / "table.csv", "ä\r\nb\n")
    assert (tmp_path / "table.csv").read_bytes() == "ä\r\nb\n".encode()
    assert names(tmp_path) == ["table.csv"]


def test_a_line_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "log.jsonl", []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(path.read_text()))
    files.append(path, {"round": 0})
    files.append(path, {"round": 1})
    # Flushed before it is synced: what the kernel does not have cannot reach the disk.
    assert synced == ['{"round": 0}\n', '{"round": 0}\n{"round": 1}\n']


def test_lines_that_do_not_fit_on_the_disk_leave_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    files.append(path, {"round": 0})

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        files.append(path, {"round": 1})
    assert caught.value.filename == str(path)
    assert path.read_text() == '{"round": 0}\n'


@pytest.mark.parametrize("before", ["", '{"round": 0}\n'])
@pytest.mark.parametrize("size", [5, 200_000])
def test_what_a_killed_process_has_left_of_a_line_goes(tmp_path, before, size):
    path = tmp_path / "log.jsonl"
    path.write_text(before + '{"rou' + "x" * size)
    files.append(path, {"round": 1})
    assert path.read_text() == before + '{"round": 1}\n'


def test_infinity_is_written_as_a_word(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append(path, {"flags": {"gamma": np.inf, "sizes": (1, np.nan)}, "x": np.float64(-np.inf)})
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line == {"flags": {"gamma": "inf", "sizes": [1, "nan"]}, "x": "-inf"}
