"""Tasks for Label Studio, and what it exports, in its documented forms."""

import json

import pytest

import dynamical_jax as dj
from dynamical_jax import labeling
from dynamical_jax.labeling import label_studio

PATHS = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/ö 4.jpg", "5.jpg"]


def task(path, *annotations, **data):
    """A task as exported; of the annotations each is (class or None, time)."""
    full = [
        {
            "id": 3,
            "was_cancelled": label is None,
            "updated_at": time,
            "result": [
                {
                    "type": "choices",
                    "from_name": "label",
                    "to_name": "image",
                    "value": {"choices": [label]},
                }
            ]
            if label
            else [],
        }
        for label, time in annotations
    ]
    return {"id": 1, "data": {"path": path, **data}, "annotations": full, "predictions": []}


def write(tmp_path, content):
    path = tmp_path / "export"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(tmp_path, content):
    return label_studio.read(write(tmp_path, content), "some/photos", PATHS)


def test_tasks_come_in_order_with_predictions_and_scores(tmp_path):
    proposed = [
        labeling.Proposed("b/ö 4.jpg", "cat", 0.5, 7.0),
        labeling.Proposed("a/2.jpg", "dog", 0.9, 3.0),
        labeling.Proposed("5.jpg"),
    ]
    labeled, one, two, three = json.loads(
        label_studio.tasks("some/photos", {"a/1.jpg": "dog"}, proposed)
    )
    assert labeled["annotations"][0]["result"][0]["value"] == {"choices": ["dog"]}
    assert one["data"] == {
        "image": "/data/local-files/?d=photos/b/%C3%B6%204.jpg",
        "path": "b/ö 4.jpg",
        "rank": 1,
        "score": 7.0,
    }
    assert (one["predictions"][0]["score"], two["data"]["rank"]) == (0.5, 2)
    assert "predictions" not in three
    # The tasks, annotated and given back, name the same images.
    for part in (one, two, three):
        del part["data"]["path"]
        part["annotations"] = labeled["annotations"]
    found = read(tmp_path, [labeled, one, two, three])
    assert found.labels == dict.fromkeys(["a/1.jpg", "b/ö 4.jpg", "a/2.jpg", "5.jpg"], "dog")


def test_the_configuration_is_xml_whatever_a_class_is_called():
    names = ["cat", 'a "quoted" & <marked> name']
    tree = __import__("xml.etree.ElementTree").etree.ElementTree.fromstring(
        label_studio.configuration(names)
    )
    assert [choice.get("value") for choice in tree.iter("Choice")] == names


FORMS = {
    "json": [
        task("a/1.jpg", ("cat", "2026-01-01T10:00:00Z")),
        task("a/2.jpg", (None, "2026-01-01T10:00:00Z")),
        task("b/1.jpg", ("cat", "2026-01-02T00:00:00Z"), ("dog", "2026-01-01T10:00:00Z")),
        task("5.jpg", ("dog", "1"), ("dog", "2")),
        task("elsewhere.jpg", ("dog", "1")),
    ],
    "json-min": [
        {"path": "a/1.jpg", "label": "cat", "annotation_id": 1, "updated_at": "1"},
        {"path": "a/2.jpg", "annotation_id": 2, "updated_at": "1"},
        {"path": "b/1.jpg", "label": "cat", "annotation_id": 3, "updated_at": "2"},
        {"path": "b/1.jpg", "label": "dog", "annotation_id": 4, "updated_at": "1"},
        {"path": "5.jpg", "label": {"choices": ["dog"]}, "annotation_id": 5, "updated_at": "1"},
        {"path": "elsewhere.jpg", "label": "dog", "annotation_id": 6, "updated_at": "1"},
    ],
    "csv": "annotation_id,image,label,path,updated_at\n"
    "1,x,cat,a/1.jpg,1\n2,x,,a/2.jpg,1\n3,x,cat,b/1.jpg,2\n4,x,dog,b/1.jpg,1\n"
    '5,x,"{""choices"": [""dog""]}",5.jpg,1\n6,x,dog,elsewhere.jpg,1\n',
}


@pytest.mark.parametrize("form", FORMS)
def test_skipped_and_doubly_annotated_tasks(form, tmp_path):
    found = read(tmp_path, FORMS[form])
    assert found.labels == {"a/1.jpg": "cat", "b/1.jpg": "cat", "5.jpg": "dog"}
    assert found.num_skipped == 1
    assert {path: sorted(names) for path, names in found.differing.items()} == {
        "b/1.jpg": ["cat", "dog"]
    }
    assert found.foreign == ["elsewhere.jpg"]


def test_what_was_chosen_before_a_task_was_skipped_is_no_label(tmp_path):
    skipped = task("a/1.jpg", ("cat", "1"))
    skipped["annotations"][0]["was_cancelled"] = True
    found = read(tmp_path, [skipped, task("5.jpg", ("dog", "1"))])
    assert (found.labels, found.num_skipped) == ({"5.jpg": "dog"}, 1)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/data/local-files/?d=photos/a/1.jpg", "a/1.jpg"),
        ("/data/local-files/?d=home/me/photos/b/%C3%B6%204.jpg", "b/ö 4.jpg"),
        ("/data/upload/1/0a1b2c3d-5.jpg", "5.jpg"),
        ("http://localhost:8080/data/upload/7/0a1b2c3d-2.jpg", "a/2.jpg"),
        ("/data/upload/1/0a1b2c3d-1.jpg", None),  # There are two of this name.
        ("/data/local-files/?d=other/a/1.jpg", None),
    ],
)
def test_images_are_found_by_their_address(address, path, tmp_path):
    found = read(tmp_path, [task("", ("cat", "1"), image=address), task("5.jpg", ("dog", "1"))])
    assert found.labels.get(path) == (("dog" if path == "5.jpg" else "cat") if path else None)
    assert found.foreign == ([] if path else [address])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "is no export of Label Studio"),
        ("[3]", "is no export of Label Studio: its entries are no tasks"),
        ([{"data": {}}], "is no export of Label Studio"),
        ("path,label\na/1.jpg,cat\n", "its rows have no annotation_id, but path, label"),
        ([task("elsewhere.jpg", ("cat", "1"))], "none of its images is in some/photos"),
        (
            [{"path": "5.jpg", "label": {"choices": ["a", "b"]}, "annotation_id": 1}],
            "an annotation has the classes a, b",
        ),
    ],
)
def test_what_is_no_export_is_said(content, message, tmp_path):
    with pytest.raises(dj.UserError, match=message):
        read(tmp_path, content)
    with pytest.raises(dj.UserError, match="there is no file"):
        label_studio.read(tmp_path / "nothing.json", "photos", PATHS)
