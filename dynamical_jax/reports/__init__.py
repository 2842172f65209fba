"""Reports from records: tables, tests of significance, and pictures."""

from dynamical_jax.reports import exports as exports
from dynamical_jax.reports import markdown as markdown
from dynamical_jax.reports import plotting as plotting
from dynamical_jax.reports import statistics as statistics
