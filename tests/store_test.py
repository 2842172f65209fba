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
