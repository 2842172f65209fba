"""Records in other programs' forms, read by those programs where they are installed."""

import csv
import html.parser
import io
import math

import numpy as np
import pytest

from dynamical_jax.reports import exports, plotting
from dynamical_jax.strategies import STRATEGIES


def rounds():
    return [
        {
            "dataset": "digits", "model": "cnn", "strategy": name, "seed": seed, "round": index,
            "num_labeled": 50 + 25 * index, "test_accuracy": 0.5 + 0.1 * index + 0.01 * seed,
            "query": [1, 2], "flags": {}, "query_score_mean": "inf" if index else None,
            **({"train_loss": 0.25} if index else {}),
        }
        for name in ("dynamical", "<b>mine")
        for seed in (0, 1)
        for index in (0, 1)
    ]  # fmt: skip


def test_a_tidy_table_has_a_row_for_each_round():
    rows = list(csv.DictReader(io.StringIO(exports.tidy(rounds()))))
    assert list(rows[0]) == [*exports.FIRST_COLUMNS, "test_accuracy", "train_loss"]
    assert [float(row["test_accuracy"]) for row in rows] == [
        record["test_accuracy"] for record in rounds()
    ]
    assert [row["train_loss"] for row in rows] == ["", "0.25"] * 4


class Reader(html.parser.HTMLParser):
    """Gathers the tags of a page, and the addresses that it names."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


@pytest.mark.usefixtures("drawn_pictures")
def test_a_page_needs_no_other_file(tmp_path):
    pytest.importorskip("markdown")
    plotting.accuracy(rounds(), tmp_path / "a.png")
    text = "# A <b>title\n\n| strategy | area |\n| --- | --- |\n| <b>mine | 0.5 |\n"
    page = exports.page("x & y", [text], {"accuracy": tmp_path / "a.png"})
    reader = Reader(page)
    assert {"table", "th", "img", "h1", "script"} <= set(reader.tags)
    assert "b" not in reader.tags
    assert [address[:22] for address in reader.addresses] == ["data:image/png;base64,"]
    assert "<title>x &amp; y</title>" in page


def test_event_files_hold_the_curves(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    for _ in range(2):  # The second time in place of the first.
        folders = exports.tensorboard(rounds()[:4], tmp_path)
    assert [folder.name for folder in folders] == ["dynamical-0", "dynamical-1"]
    (file,) = folders[1].iterdir()
    content, values = file.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        data = content[12 : 12 + size]
        assert masked_crc32c(data) == int.from_bytes(content[12 + size : 16 + size], "little")
        event = event_pb2.Event.FromString(data)
        values += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
        content = content[16 + size :]
    assert [(step, tag) for step, tag, _ in values] == [
        (50, "test_accuracy"), (75, "test_accuracy"), (75, "train_loss")
    ]  # fmt: skip
    np.testing.assert_allclose([value for *_, value in values], [0.51, 0.61, 0.25], rtol=1e-6)
    assert not math.isnan(values[0][2])


def test_a_strategy_has_one_colour():
    both = plotting.colors(["badge", "mine", "dynamical"])
    assert plotting.colors(["dynamical"])["dynamical"] == both["dynamical"]
    assert plotting.colors(["random", "badge"])["badge"] == both["badge"]
    every = plotting.colors(STRATEGIES).values()
    assert len(set(every)) == len(STRATEGIES)
    assert len(set(both.values())) == 3
