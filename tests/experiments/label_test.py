"""The program around the page: its flags, its end, and taking turns with dynamical-select."""

import csv
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import toy
from absl.testing import flagsaver
from PIL import Image

import dynamical_jax as dj
from dynamical_jax import labeling
from dynamical_jax.labeling.session import NewAnswer
from dynamical_jax.programs import label as program
from experiments import label, select


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for position in range(24):
        image = 100 * (position % 2) + generator.integers(0, 60, (6, 6))
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "photos" / f"{position:02d}.png")
    return tmp_path / "photos"


def truth(path):
    return ("dark", "bright")[int(path[:2]) % 2]


def asked(path):
    with path.open(newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


@pytest.mark.slow  # session_test.py compares the two, too.
def test_taking_turns_with_select(run_binary, photos, tmp_path, cache_dir):
    """What one program has asked for the other hands out, and takes no label twice."""
    given = {"model": "linear", "max_epochs": 3, "batch_size": 5, "strategy": "margin"}

    def run_select():
        status, output, errors = run_binary(select, images="photos", **given)
        assert (status, errors) == (None, "")
        return output, asked(tmp_path / "to_label.csv")

    def sitting():
        with flagsaver.flagsaver(cache_dir=cache_dir, classes=["dark", "bright"], **given):
            return labeling.Session(program.check_flags(["photos"]))

    _, drawn = run_select()
    with sitting() as page:
        assert [offer.path for offer in page.offers("me", 9)] == drawn
        for path in drawn:
            (offer,) = page.offers("me")
            assert offer.path == path
            page.answer("me", [NewAnswer(offer.id, "label", truth(path))])
        page.wait()
        batch = [offer.path for offer in page.offers("me", 9)]
        (first, second, *_) = page.offers("me", 2)
        page.answer("me", [NewAnswer(first.id, "label", truth(first.path))])
        page.answer("me", [NewAnswer(second.id, "broken")])
    assert asked(tmp_path / "to_label.csv") == batch
    output, wanted = run_select()
    assert "6 labeled" in output
    assert "trained for" in output
    assert not {first.path, second.path, *drawn} & set(wanted)
    with sitting() as page:
        assert [offer.path for offer in page.offers("me", 9)] == wanted
        page.wait()
        assert page.status()["has_model"]  # That of select.
    # No label is new to the model that the page has trained, or that select has.
    output, again = run_select()
    assert "no labels that the model was not trained on" in output
    assert again == wanted


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ([], {}, "a folder of images must be given, as in dynamical-label photos"),
        (["nowhere"], {}, "as in dynamical-label photos; got nowhere"),
        (["photos", "more"], {}, "unexpected argument 'more'"),
        (["photos"], {"labels": "a.txt"}, "tables must be .csv files"),
        (["photos"], {"labels": "to_label.csv"}, "--labels and --output must be different files"),
        (["photos"], {"strategy": "albl"}, "albl learns from how its last query was labeled"),
        (["photos"], {"batch_size": 0}, "batch_size must be at least 1"),
        (["photos"], {"classes": ["a", ""]}, "a class needs a name"),
        (["photos"], {"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
        (["photos"], {"host": "a" * 300}, ": there is no such host"),
        (["photos"], {"host": "192.0.2.1"}, "cannot listen on 192.0.2.1, port 8765: Cannot assign"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(run_binary, photos, arguments, values, message):
    status, output, errors = run_binary(label, *arguments, **values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_without_the_extra_the_command_to_install_it(run_binary, photos, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "starlette" else found(name)
    )
    status, _, errors = run_binary(label, "photos")
    assert status == 1
    assert errors == "error: the page needs more packages: pip install 'dynamical-jax[label]'\n"


def test_the_usual_port_is_not_fought_for():
    with program.listen("127.0.0.1", None) as one, program.listen("127.0.0.1", None) as other:
        ports = [taken.getsockname()[1] for taken in (one, other)]
        assert ports[0] != ports[1]
        with pytest.raises(dj.UserError, match="Address already in use"):
            program.listen("127.0.0.1", ports[0])
        with pytest.raises(OSError, match=r"refused|timed out"):
            socket.create_connection(("127.0.0.2", ports[0]), timeout=1)


def test_ctrl_c_is_one_line_and_a_second_one_is_refused(photos, tmp_path, cache_dir):
    environment = {**os.environ, "PYTHONPATH": str(toy.ROOT)}
    command = [sys.executable, "-m", "experiments.label", "photos", "--open=false", "--port=0"]
    command += [f"--cache_dir={cache_dir}", "--host=0.0.0.0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "24 images, 0 labeled\n"
        line = process.stdout.readline()
        address = re.fullmatch(
            r"Open (http://127\.0\.0\.1:\d+/[\w-]{32}/) in a browser; Ctrl-C here ends it\n", line
        )[1]
        with urllib.request.urlopen(address) as page:
            assert b"page.js" in page.read()
        second = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True
        )
        assert second.returncode == 1
        assert second.stderr == "error: to_label.csv is in use by another process: wait for it\n"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "")
    warning, stopped = errors.splitlines()
    assert warning.startswith("warning: whoever reaches port")
    assert stopped == "stopped; all labels are on disk, the same command goes on"
