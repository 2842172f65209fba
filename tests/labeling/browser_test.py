"""The page in a real browser, by keyboard alone: headless Chromium, where there is one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy
from PIL import Image

import dynamical_jax as dj
from dynamical_jax import labeling

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1100,800"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def photos(tmp_path):
    """A hundred digits, and the truth."""
    digits, truth = dj.datasets.load("digits").pool, {}
    (tmp_path / "photos").mkdir()
    for row in range(100):
        truth[f"{row:03d}.png"] = str(digits.y[row])
        Image.fromarray(digits.x[row, ..., 0]).save(tmp_path / "photos" / f"{row:03d}.png")
    return truth


@contextlib.contextmanager
def program(folder, *arguments):
    """Runs the program; gives its address, and the process."""
    command = [sys.executable, "-m", "experiments.label", "photos", "--open=false", "--port=0"]
    command += ["--cache_dir=cache", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(toy.ROOT)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            process.stdout.readline()
            yield process.stdout.readline().split()[1], process
        finally:
            process.kill()


class Page:
    """The page as somebody uses it who has no mouse."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.shown = None

    def script(self, text, *arguments):
        return self.driver.execute_script(f"return {text}", *arguments)

    def until(self, condition, seconds=150):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.1)
        return value

    def press(self, *keys):
        webdriver = pytest.importorskip("selenium.webdriver")
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def picture(self):
        """The name of the picture that is there to be labeled now, another than the last one."""

        def fresh():
            shown = self.script(
                "(() => { const p = document.getElementById('picture');"
                " return !state.busy && p.complete && p.naturalWidth > 0 && p.dataset.id"
                " ? [p.dataset.id, p.alt] : null })()"
            )
            return shown if shown and shown[0] != self.shown else None

        self.shown, name = self.until(fresh)
        return name

    def status(self):
        return self.script("state.status")


def on_disk(folder):
    return labeling.read_labels(folder / "labels.csv", str(folder / "photos")).by_path


def test_thirty_digits_by_keyboard_with_a_kill_in_the_middle(driver, photos, tmp_path):
    pressed = {}
    arguments = ("--batch_size=10", "--model=linear", "--max_epochs=100")
    for part, count in enumerate((13, 17)):
        classes = () if part else ("--classes=0,1,2,3,4,5,6,7,8",)
        with program(tmp_path, *arguments, *classes) as (address, process):
            page = Page(driver, address)
            page.picture()
            if not part:
                page.press("n")
                page.press("9\n")
                page.until(lambda page=page: len(page.status()["classes"]) == 10)
                page.shown = None
                page.picture()
            page.shown = None
            for _ in range(count):
                name = page.picture()
                assert name not in pressed
                page.press(photos[name])  # A class that is called as a key has that key.
                pressed[name] = photos[name]
            page.until(lambda page=page: page.status()["labeled"] == len(pressed))
            process.send_signal(signal.SIGKILL if not part else signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert on_disk(tmp_path) == pressed
        if part:
            assert errors == "stopped; all labels are on disk, the same command goes on\n"
            assert process.returncode == 130
    log = labeling.answers.Log(tmp_path / "labels.answers.jsonl")
    assert [one.path for one in log.answers] == list(pressed)
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert not [m for m in messages if "net::ERR_CONNECTION_" not in m]  # Refused, or reset.


def test_undo_skip_grid_and_markup(driver, photos, tmp_path):
    known = dict(list(photos.items())[:40])
    labeling.add_labels(tmp_path / "labels.csv", known)
    evil = "<img src=x onerror=document.title='evil'>"
    with program(
        tmp_path, "--model=linear", "--batch_size=8", f"--classes={','.join('0123456789')},{evil}"
    ) as (address, _):
        page = Page(driver, address)
        name = page.picture()
        assert evil in driver.find_element("id", "classes").text
        page.press("a")  # The eleventh class is markup.
        page.until(lambda: page.status()["labeled"] == 41)
        assert on_disk(tmp_path)[name] == evil
        page.press("u")
        page.until(lambda: page.status()["labeled"] == 40)
        page.shown = None
        assert page.picture() == name
        assert name not in on_disk(tmp_path)
        page.press("s")
        assert page.picture() != name
        for typed, count in (("nother\n", 12), ("nOther\n", 12), ("\n", 13)):
            page.press(typed[0])
            page.press(typed[1:])
            page.until(lambda count=count: len(page.status()["classes"]) == count)
            page.until(lambda: not page.script("state.busy"))
            if typed == "nOther\n":
                assert "There is a class “other”" in driver.find_element("id", "toast").text
        page.press("h")
        assert driver.find_element("id", "guess").is_displayed()
        page.until(lambda: page.status()["has_model"])
        page.press("g")
        page.until(lambda: page.script("state.grid.length") > 1)
        expected = {cell["name"]: cell["predicted"] for cell in page.script("state.grid")}
        first, second = list(expected)[:2]
        page.press("0")
        page.press("\ue014")  # The arrow to the right.
        page.press("x")
        expected[first] = "0"
        del expected[second]
        page.press("\ue007")
        page.until(lambda: page.status()["labeled"] == 40 + len(expected))
        assert {path: on_disk(tmp_path)[path] for path in expected} == expected
        assert second not in on_disk(tmp_path)
        page.press("p")
        page.until(lambda: "Labels that may be wrong" in page.script("document.body.innerText"))
        assert "evil" not in driver.title
        # Nothing is loaded from elsewhere.
        loaded = page.script("performance.getEntriesByType('resource').map((e) => e.name)")
        assert json.dumps(loaded).count("://") == sum(url.startswith(address) for url in loaded)
    assert np.all([label in "0123456789" for label in on_disk(tmp_path).values()])
