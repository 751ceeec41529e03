"""Measuring the intrinsic dimension of a task: of any function that trains once and returns a score."""

from .curve import grid as grid
from .engine import RayEngine as RayEngine
from .measure import NothingToMeasure as NothingToMeasure
from .measure import Result as Result
from .measure import measure_intrinsic_dimension as measure_intrinsic_dimension
from .report import write_report as write_report
