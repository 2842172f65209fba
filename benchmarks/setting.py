"""The data, the network and the labels of benchmarks of a whole round."""

from absl import flags

import dynamical_jax as dj

DATA = flags.DEFINE_string("data", "cifar10", "A data set, folder or .npz file.")
NETWORK = flags.DEFINE_string("network", "cnn", f"One of {', '.join(dj.models.MODELS)}.")
NUM_LABELS = flags.DEFINE_integer("num_labels", 500, "Labels that the network is fitted to.")
NUM_QUERIED = flags.DEFINE_integer("num_queried", 250, "How many are asked for.")
