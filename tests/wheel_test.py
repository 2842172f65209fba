"""The wheel, installed in a folder of its own and used from another, without the checkout."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import toy
from PIL import Image

FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "dynamical_jax_scripts.py")
FOLDERS = ("dynamical_jax", "experiments", "theory", "benchmarks", "tests")  # The first is wanted.


class Installed(NamedTuple):
    wheel: zipfile.ZipFile
    folder: str

    def run(self, *command, cwd):
        # The interpreter of the tests has the dependencies; the package comes from the wheel.
        environment = {**os.environ, "PYTHONPATH": self.folder}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    def select(self, cwd, **values):
        given = {"cache_dir": os.environ["DYNAMICAL_JAX_TEST_CACHE"], "images": ".", **values}
        script = os.path.join(self.folder, "bin", "dynamical-select")
        return self.run(script, *(f"--{name}={value}" for name, value in given.items()), cwd=cwd)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Built from a copy, since building leaves its traces beside the sources; asks no index."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in FILES:
        shutil.copy(toy.ROOT / name, source)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(toy.ROOT / name, source / name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", f"--wheel-dir={source}", source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    subprocess.run([*pip, "install", *offline, f"--target={folder}", wheel], check=True)
    return Installed(zipfile.ZipFile(wheel), str(folder))


@pytest.fixture
def photos(tmp_path):
    """Twelve images, dark and bright, of which no two are nearly the same."""
    noise = np.random.default_rng(0).integers(0, 50, (12, 8, 8))
    for position in range(12):
        image = 200 * (position % 2) + noise[position]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"{position:02d}.png")
    return tmp_path


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_holds_the_package_and_nothing_else(installed):
    found = {name for name in installed.wheel.namelist() if ".dist-info/" not in name}
    package = toy.ROOT / "dynamical_jax"
    sources = [*package.rglob("*.py"), *(package / "labeling" / "page").iterdir()]
    expected = {path.relative_to(toy.ROOT).as_posix() for path in sources}
    assert found == {*expected, "dynamical_jax/py.typed", "dynamical_jax_scripts.py"}


def test_script_without_labels(installed, photos):
    done = installed.select(photos, batch_size=3)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 images in .: 0 labeled, 12 to choose from" in done.stdout
    assert len(read(photos / "to_label.csv")) == 3
    assert (photos / "to_label.png").stat().st_size > 1000
    log = json.loads((photos / "to_label.jsonl").read_text())
    assert log["git_commit"] is None  # Of no checkout, and none of what lies around.
    assert log["flags"]["batch_size"] == 3


@pytest.mark.slow  # Two processes that import JAX; the list of files above says as much.
def test_the_page_finds_its_files(installed, tmp_path):
    program = (
        "from dynamical_jax.labeling import server; print((server.PAGE / 'page.js').is_file())"
    )
    done = installed.run(sys.executable, "-c", program, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr
    done = installed.run(f"{installed.folder}/bin/dynamical-label", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a folder of images must be given")


@pytest.mark.slow  # Two processes; select_test.py looks at flags and messages.
def test_script_says_what_it_can(installed, tmp_path):
    done = installed.select(tmp_path, help="true")
    assert "dynamical-select --images=path/to/images" in done.stdout
    assert "--batch_size: Labels per query." in done.stdout
    assert "--num_rounds" not in done.stdout
    done = installed.select(tmp_path, images="nowhere")
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: --images must be a folder of images, got nowhere; --help explains more\n"
    )


@pytest.mark.slow
def test_script_trains_on_labels(installed, photos):
    rows = "".join(f"{i:02d}.png,{('dark', 'bright')[i % 2]}\n" for i in range(4))
    (photos / "labels.csv").write_text(f"path,label\n{rows}")
    done = installed.select(photos, batch_size=2, max_epochs=1)
    assert done.returncode == 0, done.stderr
    assert "trained for 1 epoch:" in done.stdout
    asked = read(photos / "to_label.csv")
    assert {row["predicted"] for row in asked} <= {"dark", "bright"}
    assert not {row["path"] for row in asked} & {f"{i:02d}.png" for i in range(4)}
    assert (photos / "to_label.checkpoint").is_dir()


@pytest.mark.parametrize("script", ["dynamical-select", "dynamical-label"])
def test_script_is_interrupted_while_it_is_still_importing(installed, tmp_path, script):
    environment = {**os.environ, "PYTHONPATH": installed.folder, "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, f"{installed.folder}/bin/{script}", "--help"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.endswith(" numpy\n"):  # JAX comes after it.
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, said) == (130, ["interrupted; nothing was begun"])
