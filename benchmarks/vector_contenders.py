"""A round of active learning on a pool of vectors: train on the labels, score the pool, choose."""

import functools

import numpy as np

from benchmarks.task import Task, Work

NUM_LABELED = 500
NUM_CLASSES = 10


@functools.cache
def _data(size: int, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of classes that overlap, and their labels; the first are labeled."""
    generator = np.random.default_rng(0)
    centers = generator.normal(0, 0.25, (NUM_CLASSES, num_features))
    y = generator.integers(0, NUM_CLASSES, size).astype(np.int32)
    x = generator.normal(size=(size, num_features)) + centers[y]
    return x.astype(np.float32), y


def dynamical_jax(task: Task) -> Work:
    """A round by a strategy of this package, with logistic regression, trained from zero."""
    import jax

    import dynamical_jax as dj

    x, y = _data(NUM_LABELED + task.pool_size, task.num_features)
    labeled = dj.Examples(x[:NUM_LABELED], y[:NUM_LABELED])
    names = tuple(map(str, range(NUM_CLASSES)))
    data = dj.Dataset("vectors", dj.Examples(x[NUM_LABELED:], y[NUM_LABELED:]), labeled, names)
    model = dj.models.create("linear", data)
    variables = dj.models.init(model, jax.random.key(0), x)
    strategy = dj.strategies.create(task.model)
    config = dj.TrainingConfig(learning_rate=dj.models.LEARNING_RATES["linear"])

    def call() -> np.ndarray:
        fit = dj.training.fit(model, variables, labeled, config, seed=0)
        view = dj.LearnerView(model.apply, fit.variables, labeled, data.pool_images)
        return strategy.query(jax.random.key(0), view, task.batch_size).positions

    return Work(call, 1)


def scikit_activeml(task: Task) -> Work:
    """The same by scikit-activeml, with scikit-learn's logistic regression."""
    from skactiveml import classifier, pool
    from sklearn import linear_model

    peers = {
        "badge": lambda: pool.Badge(random_state=0),
        "coreset": lambda: pool.CoreSet(random_state=0),
        "confidence": lambda: pool.UncertaintySampling("least_confident", random_state=0),
        "margin": lambda: pool.UncertaintySampling("margin_sampling", random_state=0),
        "entropy": lambda: pool.UncertaintySampling("entropy", random_state=0),
        "typiclust": lambda: pool.TypiClust(random_state=0),
        "probcover": lambda: pool.ProbCover(random_state=0),
        "random": lambda: pool.RandomSampling(random_state=0),
    }
    if task.model not in peers:
        raise ValueError(f"scikit-activeml has no {task.model}")
    x, y = _data(NUM_LABELED + task.pool_size, task.num_features)
    known = np.where(np.arange(len(y)) < NUM_LABELED, y, np.nan)
    model = classifier.SklearnClassifier(
        linear_model.LogisticRegression(), classes=range(NUM_CLASSES)
    )
    options = {}
    if task.model in ("badge", "confidence", "margin", "entropy"):
        options["clf"] = model

    def call() -> np.ndarray:
        model.fit(x, known)
        return peers[task.model]().query(x, known, batch_size=task.batch_size, **options)

    return Work(call, 1)
