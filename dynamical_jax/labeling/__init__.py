"""A person in the loop: which images to label next, round after round.

- `tables`: labels so far, and images to label next, in CSV files that a person edits;
- `folder`: the images, which of them are labeled, and which can be chosen;
- `learner`: the model, trained further in each round;
- `proposal`: the images that a strategy chooses to be labeled next.
"""

from dynamical_jax.labeling import folder as folder
from dynamical_jax.labeling import learner as learner
from dynamical_jax.labeling import proposal as proposal
from dynamical_jax.labeling import tables as tables
from dynamical_jax.labeling.folder import Folder as Folder
from dynamical_jax.labeling.learner import Config as Config
from dynamical_jax.labeling.learner import Learner as Learner
from dynamical_jax.labeling.tables import Labels as Labels
from dynamical_jax.labeling.tables import Proposed as Proposed
from dynamical_jax.labeling.tables import add_labels as add_labels
from dynamical_jax.labeling.tables import join_labels as join_labels
from dynamical_jax.labeling.tables import read_labels as read_labels
from dynamical_jax.labeling.tables import write_proposal as write_proposal
