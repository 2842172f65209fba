"""Arrays on disk, when the disk is full."""

import numpy as np
import pytest

import dynamical_jax as dj


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def save(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    store = dj.store.Store(tmp_path)
    with pytest.raises(dj.UserError, match=r"cannot write .*one: there is no space left"):
        store.save("one", [np.zeros(2)], {})
    assert store.restore(dict, lambda description, leaves: leaves) is None


def test_a_look_at_what_is_damaged_changes_nothing_and_says_so(tmp_path):
    said = []
    store = dj.store.Store(tmp_path, said.append)
    look = lambda: store.restore(dict, lambda description, leaves: description["n"], tidy=False)
    for number in range(2):
        store.save(f"{number}", [np.zeros(2)], {"n": number})
    assert look() == 1
    (tmp_path / "1.json").write_text("{")
    assert look() == 0
    assert "1 is damaged" in said[0]
    assert said[0].endswith(f": the one before it is used, {tmp_path / '0'}")
    (tmp_path / "0.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(dj.UserError, match=f"{tmp_path / '1'} is damaged"):
        look()
    assert sorted(tmp_path.rglob("*")) == before
