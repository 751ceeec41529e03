"""Subspaces learned from a training trajectory (Zhang, Liu, Shao 2023, arXiv 2305.17446)."""

from ..projection.subspace import Subspace as Subspace
from .fit import fit_subspace as fit_subspace
from .record import TrajectoryCallback as TrajectoryCallback
from .record import record as record
from .record import record_gradients as record_gradients
from .record import snapshots as snapshots
