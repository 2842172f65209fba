"""Command lines that cannot be read."""

import pytest
import toy
from absl.testing import flagsaver

from dynamical_jax.programs import binary, options, person


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--max_epoch=3", "'max_epoch'. Did you mean: max_epochs? (--help"),
        (f"--{options.MAX_EPOCHS.name}=many", "--max_epochs=many"),
        (f"--{options.MAX_EPOCHS.name}=1\r\n2\u20283", "--max_epochs=1 2 3"),
        ("--first\x1b[31m", "'first\\x1b[31m'"),
        (f"--{options.MAX_EPOCHS.name}", "--max_epochs"),
        ("--flagfile=nowhere", "nowhere"),
        (f"--{person.OVERWRITE.name}=maybe", "--overwrite=maybe: it takes no value"),
        (f"--{options.MAX_EPOCHS.name}={'9' * 5000}", "…"),
    ],
)
def test_a_flag_that_cannot_be_read_is_told_in_one_line(flag, told, capsys):
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        binary.parse_flags(["program", flag])
    output, errors = capsys.readouterr()
    assert (ended.value.code, output) == (1, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert line.isprintable()
    assert len(line) < 500


def test_flags_are_taken_off_the_command_line():
    with flagsaver.flagsaver():
        assert binary.parse_flags(["program", "a", "--max_epochs=7", "b"]) == ["program", "a", "b"]
        assert options.MAX_EPOCHS.value == 7


def test_all_programs_are_started_alike():
    programs = [
        path
        for room in ("experiments", "theory", "benchmarks")
        for path in (toy.ROOT / room).glob("*.py")
    ]
    assert any("binary.launch(main)" in path.read_text() for path in programs)
    assert not [path for path in programs if "app.run" in path.read_text()]
