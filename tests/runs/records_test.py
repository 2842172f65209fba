import fractions
import json
import math
import subprocess

import numpy as np
import pytest
import toy
from toy import RECORDS, record

import dynamical_jax as dj
from dynamical_jax.runs import records


def test_curves():
    curves = records.curves(RECORDS)
    np.testing.assert_array_equal(curves["a"].num_labeled, [10, 15])
    np.testing.assert_allclose(curves["a"].mean, [0.2, 0.4])
    np.testing.assert_allclose(curves["a"].std, [np.sqrt(0.02), np.sqrt(0.08)])  # n − 1
    assert curves["a"].num_seeds == 2
    np.testing.assert_allclose(curves["b"].mean, [0.5])
    assert np.isnan(curves["b"].std).all()


def test_a_round_that_not_every_seed_reached_is_left_out():
    np.testing.assert_array_equal(records.curves(RECORDS[:3])["a"].num_labeled, [10])


@pytest.mark.parametrize(
    "other", [record("a", 0, 1, 0.3), {**record("a", 2, 1, 0.3), "num_labeled": 99}]
)
def test_records_of_two_settings_have_no_common_curve(other):
    with pytest.raises(dj.UserError, match="are of more than one setting"):
        records.curves([*RECORDS, other])


def test_table():
    assert records.table(RECORDS).splitlines() == [
        "labels               a               b",
        "    10   20.00 ± 14.14           50.00",
        "    15   40.00 ± 28.28                ",
    ]


@pytest.mark.parametrize("seeds", [1, 2, 4, 5, 8])
def test_means_of_fractions_are_rounded_as_the_fractions_are(seeds):
    generator, by_accident = np.random.default_rng(seeds), 0
    for size in (797, 4000, 10_000):
        for right in generator.integers(size, size=(300, seeds)):
            exact = fractions.Fraction(int(right.sum()), size * seeds) * 10_000
            expected = f"{math.floor(exact + fractions.Fraction(1, 2)) / 100:.2f}"
            mean = np.mean(right / size)
            assert records.format_percent(mean) == expected
            by_accident += f"{100 * mean:.2f}" != expected
    assert by_accident > 0


def test_numbers_of_tables():
    shown = [
        records.format_number(x) for x in (0.125, -0.125, 1e-17, -1e-17, -0.001, 99.995, 12345.0)
    ]
    assert shown == ["0.13", "-0.13", "0.00", "0.00", "0.00", "100.00", "12345.00"]
    assert records.format_number(1 / 32, digits=4) == "0.0313"
    assert records.format_number(1234.5, digits=0) == "1235"
    assert [records.format_number(x, sign="+") for x in (0.1 + 0.2 - 0.3, 2.5, -2.5)] == [
        *("+0.00", "+2.50", "-2.50")
    ]
    assert [records.format_number(x) for x in (np.nan, np.inf)] == ["nan", "inf"]


def test_table_rounds_halves():
    line = records.table([record("a", seed, 0, acc) for seed, acc in enumerate([0.3712, 0.3713])])
    assert line.splitlines()[1].split() == ["10", "37.13", "±", "0.01"]


def test_append_and_read(tmp_path):
    path = tmp_path / records.FILE_NAME
    for line in RECORDS:
        dj.files.append(path, line)
    assert records.read(path) == RECORDS
    assert len(path.read_text().splitlines()) == len(RECORDS)


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / records.FILE_NAME
    for line in RECORDS[:2]:
        dj.files.append(path, line)
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"strategy": "a", "se')
    assert records.read(path) == RECORDS[:2]
    said = []
    assert records.repair(path, said.append) == RECORDS[:2]
    assert said == [f"{path}: the last line was not finished: dropped"]
    assert path.read_bytes() == whole
    assert records.repair(path, said.append) == RECORDS[:2]
    assert len(said) == 1


def test_what_is_no_record_is_named(tmp_path):
    path = tmp_path / records.FILE_NAME
    with pytest.raises(dj.UserError, match=r"cannot read .* No such file"):
        records.read(path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"labels: 5", "malformed"),
        (b"3", "Expected `object`, got `int`"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
        (b'{"a": ' * 100_000, "recursion depth"),
        (b"\xff", "malformed"),
        (b'{"strategy": "\xff"}', "invalid start byte"),
        ({"seed": None}, r"Expected `int`, got `null` - at `\$.seed`"),
        ({"seed": 2**80}, r"`\$.seed`"),
        ({"round": -1}, r"Expected `int` >= 0 - at `\$.round`"),
        ({"round": 0.5}, r"Expected `int`, got `float` - at `\$.round`"),
        ({"test_accuracy": 55.2}, r"Expected `float` <= 1.0 - at `\$.test_accuracy`"),
        ({"test_accuracy": True}, r"Expected `float`, got `bool` - at `\$.test_accuracy`"),
        ({"query": [1, "2"]}, r"Expected `int`, got `str` - at `\$.query\[1\]`"),
        ({"test_loss": "much"}, r"Invalid enum value 'much' - at `\$.test_loss`"),
    ],
    ids=str,
)
def test_what_is_no_record_is_named_with_its_line_and_field(tmp_path, line, why):
    path = tmp_path / records.FILE_NAME
    dj.files.append(path, RECORDS[0])
    if isinstance(line, dict):
        line = json.dumps({**RECORDS[1], **line}).encode()
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(dj.UserError, match=rf"line 2 of .* cannot be used: .*{why}"):
        records.read(path)


def test_environment_is_json():
    environment = json.loads(json.dumps(records.environment()))
    assert set(environment) == {"versions", "device", "git_commit"}
    assert environment["versions"]["jax"]


@pytest.mark.skipif(not (toy.ROOT / ".git").exists(), reason="this is no checkout")
def test_environment_names_the_commit_of_this_checkout():
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=toy.ROOT, capture_output=True, text=True, check=True)
    commit = records.environment()["git_commit"]
    assert commit.removesuffix("-dirty") == done.stdout.strip()
