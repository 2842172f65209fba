"""A person in the loop: which images to label next, round after round.

- `tables`: labels so far, and images to label next, in CSV files that a person edits;
- `folder`: the images, which of them are labeled, and which can be chosen;
- `learner`: the model, trained further in each round;
- `proposal`: the images that a strategy chooses to be labeled next;
- `session`: pictures handed out, answers taken, the next batch chosen meanwhile; `choosing` is that
  work and `worker` its thread, `book` what is on disk, `history` what can be taken back;
- `answers`, `standing`, `review`: all that was answered; how far that is; labels that may be wrong;
- `prediction`: the model of the last round, for other images;
- `classes`: names of classes, and those that are nearly the same;
- `previews`, `export`, `server`: pictures for a browser, a folder for each class, and the page;
- `label_studio`: its tasks, and the annotations that it exports.
"""

from dynamical_jax.labeling import answers as answers
from dynamical_jax.labeling import book as book
from dynamical_jax.labeling import choosing as choosing
from dynamical_jax.labeling import classes as classes
from dynamical_jax.labeling import export as export
from dynamical_jax.labeling import folder as folder
from dynamical_jax.labeling import label_studio as label_studio
from dynamical_jax.labeling import learner as learner
from dynamical_jax.labeling import prediction as prediction
from dynamical_jax.labeling import proposal as proposal
from dynamical_jax.labeling import review as review
from dynamical_jax.labeling import session as session
from dynamical_jax.labeling import standing as standing
from dynamical_jax.labeling import tables as tables
from dynamical_jax.labeling.folder import Folder as Folder
from dynamical_jax.labeling.learner import Config as Config
from dynamical_jax.labeling.learner import Learner as Learner
from dynamical_jax.labeling.prediction import load as load
from dynamical_jax.labeling.session import Session as Session
from dynamical_jax.labeling.tables import Labels as Labels
from dynamical_jax.labeling.tables import Proposed as Proposed
from dynamical_jax.labeling.tables import add_labels as add_labels
from dynamical_jax.labeling.tables import join_labels as join_labels
from dynamical_jax.labeling.tables import read_labels as read_labels
from dynamical_jax.labeling.tables import write_proposal as write_proposal
