"""Deep active learning by training dynamics (dynamicAL) in JAX.

import dynamical_jax as dj

data = dj.datasets.load("digits")
model = dj.models.create("cnn", data)
experiment = dj.Experiment(data, model, dj.STRATEGIES["dynamical"](), dj.Budget(50, 50, 5))
for round_result in experiment.run():
    print(round_result.num_labeled, round_result.test.accuracy)
"""

from dynamical_jax import active_learning as active_learning
from dynamical_jax import data as data
from dynamical_jax import dynamics as dynamics
from dynamical_jax import embedding as embedding
from dynamical_jax import errors as errors
from dynamical_jax import files as files
from dynamical_jax import gradients as gradients
from dynamical_jax import labeling as labeling
from dynamical_jax import losses as losses
from dynamical_jax import models as models
from dynamical_jax import nnx_modules as nnx_modules
from dynamical_jax import ntk as ntk
from dynamical_jax import parallel as parallel
from dynamical_jax import reports as reports
from dynamical_jax import runs as runs
from dynamical_jax import store as store
from dynamical_jax import strategies as strategies
from dynamical_jax import streams as streams
from dynamical_jax import training as training
from dynamical_jax import types as types
from dynamical_jax import words as words
from dynamical_jax.active_learning import Budget as Budget
from dynamical_jax.active_learning import Experiment as Experiment
from dynamical_jax.data import datasets as datasets
from dynamical_jax.data import folders as folders
from dynamical_jax.data import images as images
from dynamical_jax.data import pool as pool
from dynamical_jax.data.datasets import Dataset as Dataset
from dynamical_jax.errors import UserError as UserError
from dynamical_jax.losses import Loss as Loss
from dynamical_jax.ntk import alignment as alignment
from dynamical_jax.ntk import generalization as generalization
from dynamical_jax.ntk import mmd as mmd
from dynamical_jax.reports import plotting as plotting
from dynamical_jax.reports import statistics as statistics
from dynamical_jax.runs import checkpoints as checkpoints
from dynamical_jax.runs import comparison as comparison
from dynamical_jax.runs import progress as progress
from dynamical_jax.runs import records as records
from dynamical_jax.runs import run_directory as run_directory
from dynamical_jax.strategies import STRATEGIES as STRATEGIES
from dynamical_jax.strategies import LearnerView as LearnerView
from dynamical_jax.strategies import selection as selection
from dynamical_jax.training import TrainingConfig as TrainingConfig
from dynamical_jax.types import Examples as Examples
from dynamical_jax.types import Outputs as Outputs
