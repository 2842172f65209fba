"""k-means of embeddings."""

import warnings

import numpy as np

from dynamical_jax import streams
from dynamical_jax.types import Array

FEW = 50


def cluster(key: Array, points: np.ndarray, count: int) -> np.ndarray:
    """Returns the cluster of each of the points `[n, d]`, `[n]`, by k-means.

    More than 50 clusters come from mini-batches, as in the programs of the papers that cluster.
    Clusters can be empty where points are copies of each other.

    Args:
      key: of the first centers.
      points: what is clustered.
      count: how many clusters; at most one for each point.
    """
    # Here, because it takes longer to import than all else together.
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    seed = int(streams.generator_of(key).integers(2**32))
    count = min(count, len(points))
    if count <= FEW:
        means = KMeans(count, random_state=seed)
    else:
        means = MiniBatchKMeans(count, batch_size=5_000, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # Fewer distinct points than clusters.
        return means.fit_predict(points)
