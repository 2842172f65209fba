"""Rounds with the real Label Studio, which is installed into an environment of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

import dynamical_jax as dj
from experiments import select

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef0123456789abcdef01234567"
FORMS = ("JSON", "JSON_MIN", "CSV")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program, from DYNAMICAL_JAX_LABEL_STUDIO, or installed by pip."""
    if given := os.environ.get("DYNAMICAL_JAX_LABEL_STUDIO"):
        return pathlib.Path(given)
    folder = tmp_path_factory.mktemp("label-studio")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "label-studio"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("label-studio cannot be installed here")
    return folder / "bin" / "label-studio"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty digits, and the truth."""
    folder, truth = tmp_path_factory.mktemp("studio") / "my photos", {}
    folder.mkdir()
    digits = dj.datasets.load("digits").pool
    for row in range(60):
        truth[f"{row}.png"] = f"digit {digits.y[row] % 3}"
        Image.fromarray(digits.x[row, ..., 0]).save(folder / f"{row}.png")
    return folder, truth


class Studio:
    """A project of Label Studio, by its API."""

    def __init__(self, port):
        self.address, self.project = f"http://127.0.0.1:{port}", 0

    def ask(self, path, body=None):
        headers = {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, content, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def create(self, configuration, photos):
        body = {"title": "photos", "label_config": configuration}
        self.project = json.loads(self.ask("/api/projects", body))["id"]
        storage = {"project": self.project, "path": str(photos), "use_blob_urls": True}
        self.ask("/api/storages/localfiles", storage)

    def load(self, tasks):
        """Imports tasks; returns those that have no annotation, in their order."""
        self.ask(f"/api/projects/{self.project}/import", json.loads(tasks.read_text()))
        path = f"/api/tasks?project={self.project}&page_size=100&fields=all"
        found = json.loads(self.ask(path))["tasks"]
        return [task for task in found if not task["total_annotations"] and not task["annotations"]]

    def annotate(self, task, label):
        """Annotates a task; skips it where the label is None."""
        choice = {"from_name": "label", "to_name": "image", "type": "choices"}
        result = [] if label is None else [{**choice, "value": {"choices": [label]}}]
        body = {"result": result, "was_cancelled": label is None}
        self.ask(f"/api/tasks/{task['id']}/annotations/", body)


@pytest.fixture(scope="module")
def studio(program, photos, tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(photos[0].parent),
        "COLLECT_ANALYTICS": "False",
        "LATEST_VERSION_CHECK": "False",
    }
    command = [program, "start", "--no-browser", "--internal-host=127.0.0.1", f"--port={port}"]
    command += ["--data-dir", tmp_path_factory.mktemp("data"), "--username=me@example.com"]
    command += ["--password=a-long-password", f"--user-token={TOKEN}", "--enable-legacy-api-token"]
    output = tmp_path_factory.mktemp("output") / "log"
    with output.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        studio, end = Studio(port), time.monotonic() + 600
        while True:
            try:
                studio.ask("/health")
                break
            except (urllib.error.URLError, OSError):
                ended = process.poll() is not None or time.monotonic() > end
                assert not ended, output.read_text()[-2000:]
                time.sleep(1)
        yield studio
    finally:
        process.kill()
        process.wait()


def test_rounds_with_label_studio(studio, photos, run_binary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, truth = photos
    given = {
        "images": str(folder),
        "batch_size": 12,
        "model": "linear",
        "max_epochs": 20,
        "label_studio": "tasks.json",
        "classes": ["digit 0", "digit 1", "digit 2"],
    }
    status, output, errors = run_binary(select, **given)
    assert (status, errors) == (None, "")
    assert "tasks.json: tasks for Label Studio; its configuration is tasks.xml" in output
    studio.create((tmp_path / "tasks.xml").read_text(), folder)
    expected = {}
    for form in FORMS:
        tasks = studio.load(tmp_path / "tasks.json")
        proposed = [row.path for row in dj.labeling.tables.read_proposal(
            tmp_path / "to_label.csv", str(folder)
        )]  # fmt: skip
        assert [task["data"]["path"] for task in tasks] == proposed
        assert studio.ask(tasks[0]["data"]["image"]) == (folder / proposed[0]).read_bytes()
        if form != FORMS[0]:
            assert all(task["predictions"][0]["result"][0]["value"]["choices"] for task in tasks)
        for task in tasks[:10]:
            path = task["data"]["path"]
            studio.annotate(task, truth[path])
            expected[path] = truth[path]
        studio.annotate(tasks[10], None)
        # Of two people the later one is right.
        path = tasks[11]["data"]["path"]
        expected[path] = truth[path]
        for label in ("digit 0" if truth[path] != "digit 0" else "digit 1", truth[path]):
            studio.annotate(tasks[11], label)
        export = studio.ask(f"/api/projects/{studio.project}/export?exportType={form}")
        (tmp_path / "export").write_bytes(export)
        status, output, errors = run_binary(select, annotations="export", **given)
        assert (status, errors) == (None, "")
        assert f"export: {len(expected)} images annotated" in output
        assert f"{path} is annotated" in output
        assert dj.labeling.read_labels(tmp_path / "labels.csv", str(folder)).by_path == expected
