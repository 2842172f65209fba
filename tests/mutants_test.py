"""The faults of `mutants.py` can be planted; that they are found is for `mutants.py` to show."""

import mutants
import pytest


@pytest.mark.parametrize("fault", mutants.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault, tmp_path):
    source = (mutants.ROOT / fault.file).read_text(encoding="utf-8")
    (tmp_path / fault.file).parent.mkdir(parents=True)
    (tmp_path / fault.file).write_text(source, encoding="utf-8")
    with mutants.plant(fault, tmp_path):
        assert fault.new in (tmp_path / fault.file).read_text(encoding="utf-8")
    assert (tmp_path / fault.file).read_text(encoding="utf-8") == source
    assert all((mutants.ROOT / path).exists() for path in fault.tests)


def test_text_that_has_changed_is_named():
    fault = mutants.FAULTS[0]
    with pytest.raises(
        ValueError, match=r"dynamics.py holds the text to replace 0 times, not once"
    ):
        mutants.planted(fault, "")


def test_there_are_twenty():
    assert len({fault.name for fault in mutants.FAULTS}) == 20
