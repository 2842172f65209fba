"""The page's server, asked by the page and by others."""

import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import dynamical_jax as dj
from dynamical_jax import labeling
from dynamical_jax.labeling import choosing, server, tables

TOKEN = "a-token-in-the-address"
HERE = "http://127.0.0.1:8765"


def choose(folder, settings, is_open, report):
    """Takes the place of the model: everything is a cat."""
    predicted = {
        folder.paths[row]: tables.Proposed(folder.paths[row], "cat", 0.9, 1.0)
        for row in folder.unlabeled
    }
    wanted = [image for image in predicted.values() if is_open(image.path)]
    return choosing.Chosen(wanted[: settings.batch_size], [], predicted, {})


@pytest.fixture
def photos(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    generator = np.random.default_rng(0)
    for position in range(8):
        image = generator.integers(0, 255, (300 * (position == 0) + 20, 400, 3), dtype=np.uint8)
        Image.fromarray(image).save(path / f"{position}.jpg")
    (tmp_path / "secret.jpg").write_bytes((path / "1.jpg").read_bytes())
    return path


@pytest.fixture
def sitting(photos, tmp_path):
    settings = choosing.Settings(
        str(photos),
        tmp_path / "labels.csv",
        tmp_path / "to_label.csv",
        dj.STRATEGIES["confidence"](),
        labeling.Config("linear", {}, dj.TrainingConfig(max_epochs=1), 0),
        {"cache_dir": tmp_path / "cache", "size": 8},
        batch_size=3,
        classes=("cat", "dog"),
    )
    with labeling.Session(settings, choose) as sitting:
        sitting.wait()
        yield sitting


@pytest.fixture
def app(sitting, photos, tmp_path):
    return server.create(sitting, TOKEN, photos, tmp_path / "labels.csv")


class Browser(TestClient):
    """Asks as the page does."""

    def send_json(self, path, headers=None, **body):
        headers = {"origin": HERE, **(headers or {})}
        return self.post(f"/{TOKEN}/{path}", json={"client": "tab1", **body}, headers=headers)

    def look(self, path):
        return self.get(f"/{TOKEN}/{path}")


@pytest.fixture
def browser(app):
    # Messages of the client itself are of no interest.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    return Browser(app, base_url=HERE, follow_redirects=False)


def rows(tmp_path):
    return labeling.read_labels(tmp_path / "labels.csv", "photos").by_path


def test_pictures_come_and_labels_go(browser, tmp_path):
    (one, two, _) = browser.send_json("next", count=3).json()["offers"]
    answer = browser.send_json("answer", given=[{"id": one["id"], "what": "label", "label": "cat"}])
    assert rows(tmp_path) == {one["name"]: "cat"}
    assert answer.json()["offers"][0]["id"] == two["id"]
    assert answer.json()["status"]["labeled"] == 1
    undone = browser.send_json("undo").json()
    assert [offer["id"] for offer in undone["undone"]] == [one["id"]]
    assert undone["offers"][0]["id"] == one["id"]
    assert rows(tmp_path) == {}
    grid = browser.send_json("grid", client="tab2").json()["grid"]
    assert {cell["predicted"] for cell in grid} == {"cat"}
    assert browser.look("status").json()["status"]["has_model"]
    assert browser.look("progress").json()["now"] is None


def test_images_are_scaled_and_never_enlarged(browser, sitting):
    sizes = {}
    for position in (0, 1):
        (identifier,) = [i for i, path in sitting._path_of.items() if path == f"{position}.jpg"]
        for size in ("thumb", "large", "full"):
            answer = browser.look(f"image/{size}/{identifier}")
            assert answer.headers["content-type"] in ("image/png", "image/jpeg")
            with Image.open(io.BytesIO(answer.content)) as image:
                sizes[position, size] = image.size
    assert sizes[0, "thumb"] == (240, 192)
    assert sizes[0, "large"] == sizes[0, "full"] == (400, 320)
    assert sizes[1, "large"] == (400, 20)


def test_exports(browser, sitting, photos, tmp_path):
    assert browser.look("labels.csv").content == b"path,label\n"
    (one,) = browser.send_json("next").json()["offers"]
    browser.send_json("class", name="../../up/and: away")
    given = [{"id": one["id"], "what": "label", "label": "../../up/and: away"}]
    browser.send_json("answer", given=given)
    assert browser.look("labels.csv").content == (tmp_path / "labels.csv").read_bytes()
    tasks = browser.look("label-studio.json").json()
    assert len(tasks) == 8
    assert tasks[0]["annotations"][0]["result"][0]["value"] == {"choices": ["../../up/and: away"]}
    assert tasks[1]["predictions"][0]["score"] == 0.9
    predictions = browser.look("predictions.csv").text
    assert predictions.splitlines()[0] == "path,label,predicted,confidence,score,rank"
    assert len(predictions.splitlines()) == 8
    for copies in (False, True, True):
        made = browser.send_json("sort", copies=copies).json()
        assert made == {"folder": str(tmp_path / "labels.sorted"), "count": 1}
        (file,) = (tmp_path / "labels.sorted").glob("*/*.jpg")
        assert file.parent.name == "_.._up_and_ away"
        assert file.is_symlink() != copies
        assert file.read_bytes() == (photos / one["name"]).read_bytes()
    # Nothing that this program has not made is replaced.
    (tmp_path / "labels.sorted" / labeling.export.MARK).unlink()
    assert "was not made by this program" in browser.send_json("sort").json()["error"]


def test_a_class_that_is_nearly_there_is_asked_about(browser):
    names = lambda answer: [one["name"] for one in answer.json()["status"]["classes"]]
    asked = browser.send_json("class", name="Cats")
    assert (asked.json()["alike"], names(asked)) == ("cat", ["cat", "dog"])
    assert names(browser.send_json("class", name="Cats", sure=True)) == ["cat", "dog", "Cats"]
    assert names(browser.send_json("class", name="cat")) == ["cat", "dog", "Cats"]


def test_nothing_without_the_token(app, browser, tmp_path):
    wrong = ("", "/", "/status", "/page.js", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", f"//{TOKEN}/status")
    for path in (*wrong, "/%00/status", "/\u00e4/status"):
        answer = browser.get(path)
        assert answer.status_code == 404
        assert TOKEN not in answer.text
        assert TOKEN not in str(answer.headers)
        assert browser.post(path or "/", json={}, headers={"origin": HERE}).status_code == 404
    assert browser.get(f"/{TOKEN}").headers["location"] == f"/{TOKEN}/"
    assert browser.look("").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:8766"},
        {"origin": "http://127.0.0.1:8765.evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "file://"},
        {"origin": HERE, "host": "evil.example:8765"},
        {"origin": "http://evil.example:8765", "host": "evil.example:8765"},
    ],
)
def test_other_pages_can_post_nothing(browser, sitting, tmp_path, headers):
    (one,) = sitting.offers("tab1")
    given = [{"id": one.id, "what": "label", "label": "cat"}]
    answer = browser.send_json("answer", headers, given=given)
    assert answer.status_code in (403, 421)
    assert rows(tmp_path) == {}
    assert browser.send_json("answer", given=given).status_code == 200


def test_forms_can_post_nothing(browser, sitting, tmp_path):
    (one,) = sitting.offers("tab1")
    given = [{"id": one.id, "what": "label", "label": "cat"}]
    text = json.dumps({"client": "tab1", "given": given})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"content-type": kind, "origin": HERE}
        answer = browser.post(f"/{TOKEN}/answer", content=text, headers=headers)
        assert answer.status_code == 415
    headers = {"content-type": "application/json"}  # Without an origin.
    assert browser.post(f"/{TOKEN}/answer", content=text, headers=headers).status_code == 403
    assert browser.get(f"/{TOKEN}/answer").status_code == 405
    assert rows(tmp_path) == {}


def test_names_by_which_the_machine_is_called(sitting, photos, tmp_path):
    def status(bound, host):
        app = server.create(sitting, TOKEN, photos, tmp_path / "labels.csv", bound)
        answer = TestClient(app, base_url=HERE).get(f"/{TOKEN}/status", headers={"host": host})
        return answer.status_code

    for host in ("localhost:9999", "127.0.0.1", "[::1]:80"):  # Tunnels have ports of their own.
        assert status("127.0.0.1", host) == 200
    for host in ("192.168.1.5:8765", "evil.example", "127.0.0.1.evil.example", "", "[::1", "a@b"):
        assert status("127.0.0.1", host) == 421
    assert status("0.0.0.0", "192.168.1.5:8765") == 200
    # What is bound to all addresses is still not to be had by another site's name.
    assert status("0.0.0.0", "evil.example:8765") == 421


@pytest.mark.parametrize(
    "path",
    [
        "image/large/../../secret.jpg",
        "image/large/..%2f..%2fsecret.jpg",
        "image/large/%2e%2e/secret.jpg",
        "image/large/1.jpg",
        "image/large/photos%2f1.jpg",
        "image/huge/0000000000000000",
        "image/../page.js",
        "..%2flabels.csv",
        "page/../page.js",
        "server.py",
        "../server.py",
    ],
)
def test_no_file_by_its_name(browser, path):
    answer = browser.get(f"{HERE}/{TOKEN}/{path}")
    assert answer.status_code == 404 or "/" + path.split("/")[-1] == "/page.js"
    assert b"\xff\xd8" not in answer.content


def test_large_bodies_are_not_read(app, browser):
    headers = {"origin": HERE, "content-type": "application/json"}
    announced = {**headers, "content-length": str(10**8)}
    answer = browser.post(f"/{TOKEN}/answer", content=b"{}", headers=announced)
    assert answer.status_code == 413
    parts = (b" " * 2**20 for _ in range(100))  # Of which nothing announces how many there are.
    answer = browser.post(f"/{TOKEN}/answer", content=parts, headers=headers)
    assert answer.status_code == 413
    answer = browser.post(
        f"/{TOKEN}/class", content=json.dumps({"name": "x" * 10**5}), headers=headers
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("class", {"name": "x" * 10_000}),
        ("class", {"name": "a\nb"}),
        ("class", {"name": ""}),
        ("class", {"name": 3}),
        ("class", {}),
        ("answer", {"given": [{"id": "REAL", "what": "label", "label": "x" * 10_000}]}),
        ("answer", {"given": [{"id": "REAL", "what": "label", "label": "no class"}]}),
        ("answer", {"given": [{"id": "REAL", "what": "remove", "label": "cat"}]}),
        ("answer", {"given": [{"id": "../secret.jpg", "what": "label", "label": "cat"}]}),
        ("answer", {"given": [{"id": "REAL", "what": "label", "label": "cat"}, 5]}),
        ("answer", {"given": [{"id": "REAL", "what": "label", "label": "cat"}] * 101}),
        ("answer", {"given": "all"}),
        ("answer", {}),
        ("next", {"count": 10**9}),
        ("next", {"count": "3"}),
        ("next", {"client": "../../x"}),
        ("next", {"client": "x" * 41}),
        ("next", {"client": None}),
        ("answer", {"who": "a\nb", "given": [{"id": "REAL", "what": "label", "label": "cat"}]}),
    ],
)
def test_what_makes_no_sense_is_one_line_and_changes_nothing(
    browser, sitting, tmp_path, path, body
):
    (one,) = sitting.offers("tab1")
    body = json.loads(json.dumps(body).replace("REAL", one.id))
    answer = browser.send_json(path, **body)
    assert answer.status_code == 400
    assert 0 < len(answer.json()["error"]) <= 500
    assert rows(tmp_path) == {}
    assert sitting.class_names == ["cat", "dog"]
    assert sitting.log.answers == []


def test_what_is_no_json(browser):
    headers = {"origin": HERE, "content-type": "application/json"}
    for text in ("", "{", "[]", "[" * 50_000, "\udcff".encode(errors="surrogateescape")):
        answer = browser.post(f"/{TOKEN}/answer", content=text, headers=headers)
        assert answer.status_code == 400


def test_markup_stays_text(browser, sitting, tmp_path):
    evil = "<script>alert(1)</script>"
    assert browser.send_json("class", name=evil).json()["name"] == evil
    (one,) = sitting.offers("tab1")
    browser.send_json("answer", given=[{"id": one.id, "what": "label", "label": evil}])
    assert rows(tmp_path) == {one.path: evil}
    # It is only ever told as JSON, and the page is the same for all.
    answer = browser.look("status")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = browser.look("")
    assert evil not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "unsafe" not in policy
    script = browser.look("page.js").text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script


def test_nothing_comes_from_elsewhere(browser):
    texts = [browser.look(name).text for name in server.STATIC]
    addresses = {"http://www.w3.org/2000/svg"}  # A name, not a place.
    for text in texts:
        for address in addresses:
            text = text.replace(address, "")
        assert "://" not in text
        assert 'src="//' not in text


def test_a_conflict_is_told(browser, sitting):
    (one,) = browser.send_json("next").json()["offers"]
    given = lambda label: [{"id": one["id"], "what": "label", "label": label}]
    browser.send_json("answer", given=given("cat"), who="Anna")
    answer = browser.send_json("answer", given=given("dog"), client="tab2", who="Ben")
    assert answer.json()["conflicts"] == [
        {"path": one["name"], "label": "dog", "before": "cat", "who": "Anna"}
    ]


def test_a_name_that_is_no_text(browser, sitting, photos, tmp_path):
    """Bytes of another encoding in the name of a file: seen, labeled, exported."""
    sitting.close()
    name = os.fsdecode(b"caf\xe9.jpg")
    (photos / name).write_bytes((photos / "1.jpg").read_bytes())
    for path in photos.glob("[0-9].jpg"):
        path.unlink()
    with labeling.Session(sitting._settings, choose) as fresh:
        app = server.create(fresh, TOKEN, photos, tmp_path / "labels.csv")
        browser = Browser(app, base_url=HERE)
        (one,) = browser.send_json("next").json()["offers"]
        assert browser.look(f"image/thumb/{one['id']}").status_code == 200
        given = [{"id": one["id"], "what": "label", "label": "cat"}]
        assert browser.send_json("answer", given=given).status_code == 200
        assert rows(tmp_path) == {name: "cat"}
        for file in ("labels.csv", "predictions.csv", "label-studio.json", "progress"):
            assert browser.look(file).status_code == 200
        assert browser.send_json("sort").json()["count"] == 1
    assert labeling.answers.Log(tmp_path / "labels.answers.jsonl").answers[0].path == name


def test_a_broken_file(browser, sitting, photos):
    (one,) = sitting.offers("tab1")
    (photos / one.path).write_bytes(b"no image")
    assert browser.look(f"image/full/{one.id}").status_code == 415
    given = [{"id": one.id, "what": "broken"}]
    assert browser.send_json("answer", given=given).json()["status"]["aside"] == 1


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("labels.csv", 'path,label\n0.jpg,cat\n"1.jpg,dog\n', "line 3 of"),
        ("labels.csv", "path,labels\n0.jpg,cat\n", "it needs path and label"),
        ("labels.csv", None, "cannot"),
        ("labels.answers.jsonl", None, "cannot write"),
    ],
)
def test_a_file_that_is_damaged_meanwhile_takes_no_answer(browser, tmp_path, file, text, told):
    one, two = browser.send_json("next", count=2).json()["offers"]
    cat = lambda offer: [{"id": offer["id"], "what": "label", "label": "cat"}]
    assert browser.send_json("answer", given=cat(one)).status_code == 200
    before = {path: path.read_bytes() for path in tmp_path.glob("labels.*")}
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir() if text is None else (tmp_path / file).write_text(text)
    for name, body in (("answer", {"given": cat(two)}), ("undo", {})):
        refused = browser.send_json(name, **body)
        assert refused.status_code == 400
        assert told in refused.json()["error"]
    if file == "labels.csv" and text is None:
        assert browser.look("labels.csv").json()["error"].startswith("cannot use")
    elif file == "labels.csv":
        assert (tmp_path / file).read_text() == text
    else:
        assert (tmp_path / "labels.csv").read_bytes() == before[tmp_path / "labels.csv"]
    # Nothing was taken: when it is mended, the same answers are.
    (tmp_path / file).rmdir() if text is None else (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(before[tmp_path / file])
    assert [offer["id"] for offer in browser.send_json("undo").json()["undone"]] == [one["id"]]
    assert browser.send_json("answer", given=cat(two)).status_code == 200
    assert rows(tmp_path) == {two["name"]: "cat"}


@pytest.mark.parametrize("text", [None, ""])
def test_a_table_that_is_taken_away_comes_back_whole(browser, sitting, tmp_path, text):
    one, two = browser.send_json("next", count=2).json()["offers"]
    cat = lambda offer: [{"id": offer["id"], "what": "label", "label": "cat"}]
    browser.send_json("answer", given=cat(one))
    (tmp_path / "labels.csv").unlink()
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    sitting._book.reread()
    browser.send_json("answer", given=cat(two))
    assert rows(tmp_path) == {one["name"]: "cat", two["name"]: "cat"}
    browser.send_json("undo")
    assert rows(tmp_path) == {one["name"]: "cat"}
