"""Queries of all strategies on random pools: none holds an example twice, or a labeled one.

`SOAK_QUERIES` of them, spread evenly over the strategies; by default 2,000.
"""

import os
import time

import jax
import numpy as np
import pytest
import toy
from flax import linen as nn

import dynamical_jax as dj

COUNT = int(os.environ.get("SOAK_QUERIES", 2_000))
FEATURES, LABELED = 3, 4
# Few, since programs are compiled for each pair.
SIZES = ((5, 1), (5, 5), (24, 7))
POOLS = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "large": lambda generator, shape: 1e3 * generator.normal(size=shape),
    "all equal": lambda generator, shape: np.ones(shape),
    "zeros": lambda generator, shape: np.zeros(shape),
    "copies": lambda generator, shape: generator.normal(size=(2, shape[1]))[
        generator.integers(0, 2, shape[0])
    ],
    "integers": lambda generator, shape: generator.integers(-1, 2, shape),
}


class Head(nn.Module):
    """Logits of a linear layer, and its input as embedding; BALD needs dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        hidden = nn.Dropout(0.5, deterministic=not train)(x)
        return dj.Outputs(nn.Dense(toy.NUM_CLASSES)(hidden), x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_queries_on_random_pools():
    model, each = Head(), -(-COUNT // len(dj.STRATEGIES))
    variables = model.init(jax.random.key(0), np.zeros((1, FEATURES), np.float32))
    for name in dj.STRATEGIES:
        generator, start, states = np.random.default_rng(0), time.process_time(), {}
        strategy, refused = dj.strategies.create(name), 0
        for number in range(each):
            size, batch_size = SIZES[number % len(SIZES)]
            draw = POOLS[list(POOLS)[number // len(SIZES) % len(POOLS)]]
            x = draw(generator, (size + LABELED, FEATURES)).astype(np.float32)
            labels = generator.integers(0, toy.NUM_CLASSES, LABELED).astype(np.int32)
            view = dj.LearnerView(model.apply, variables, (x[:LABELED], labels), x[LABELED:])
            state = states.get((size, batch_size))
            try:
                query = strategy.query(jax.random.key(number), view, batch_size, state)
            except dj.UserError:
                refused += 1  # Where scores mean nothing; it says so.
                continue
            positions = np.asarray(query.positions)
            assert positions.shape == (batch_size,), (name, number)
            assert len(np.unique(positions)) == batch_size, (name, number)
            # Positions are in the unlabeled set: none can be labeled.
            assert 0 <= positions.min() <= positions.max() < size, (name, number)
            assert np.all(np.isfinite(query.scores)), (name, number)
        spent = time.process_time() - start
        print(f"{name:22}{each:8} queries, {refused} refused, {spent:.0f} s of CPU", flush=True)
        assert refused < each / 2, name
