"""A person in the loop: tables of labels, and of images to label."""

from dynamical_jax.labeling import tables as tables
from dynamical_jax.labeling.tables import Labels as Labels
from dynamical_jax.labeling.tables import Proposed as Proposed
from dynamical_jax.labeling.tables import add_labels as add_labels
from dynamical_jax.labeling.tables import joined as joined
from dynamical_jax.labeling.tables import read_labels as read_labels
from dynamical_jax.labeling.tables import write_proposal as write_proposal
