"""Selection by scikit-activeml's versions of the strategies, from the same features as ours."""

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.task import Task, Work

STRATEGIES = {
    "badge": "Badge",
    "coreset": "CoreSet",
    "typiclust": "TypiClust",
    "probcover": "ProbCover",
    "max_herding": "MaxHerding",
    "bald": "GreedyBALD",
    "batch_bald": "BatchBALD",
}
"""Our name → theirs."""


def select(task: Task) -> Work:
    """Selection of `task.batch_size` of `task.pool_size` images by the strategy `task.model`."""
    import skactiveml.classifier
    import skactiveml.pool

    from benchmarks import strategy_contenders as ours

    num_labeled, size = ours.NUM_LABELED, ours.SMALL
    generator = np.random.default_rng(0)
    x = np.abs(generator.normal(size=(num_labeled + task.pool_size, size))).astype(np.float32)
    labels = np.arange(num_labeled) % 10
    y = np.full(len(x), np.nan)
    y[:num_labeled] = labels
    strategy = getattr(skactiveml.pool, STRATEGIES[task.model])
    classifier = LogisticRegression(max_iter=200).fit(x[:num_labeled], labels)
    if task.model == "badge":
        classifier = skactiveml.classifier.SklearnClassifier(
            LogisticRegression(max_iter=200), classes=range(10)
        ).fit(x, y)
        return Work(_query(strategy(), x, y, task, clf=classifier, fit_clf=False), 1)
    if "bald" in task.model:
        # Twenty classifiers, each of half of the labels, in the place of dropout.
        ensemble = [
            skactiveml.classifier.SklearnClassifier(
                LogisticRegression(max_iter=200), classes=range(10)
            )
            for _ in range(20)
        ]
        for each in ensemble:
            some = generator.permutation(num_labeled)[: num_labeled // 2]
            each.fit(x[some], y[some])
        return Work(_query(strategy(), x, y, task, ensemble=ensemble, fit_ensemble=False), 1)
    options = {"n_classes": 10} if task.model == "probcover" else {}
    return Work(_query(strategy(**options), x, y, task), 1)


def _query(strategy: Any, x: np.ndarray, y: np.ndarray, task: Task, **options: Any) -> Any:
    return lambda: strategy.query(x, y, batch_size=task.batch_size, **options)
