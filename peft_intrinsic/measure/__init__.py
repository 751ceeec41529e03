"""Measuring the intrinsic dimension of a task: of any function that trains once and returns a score."""

from ..trials.engine import RayEngine as RayEngine
from .analysis import NothingToMeasure as NothingToMeasure
from .analysis import Result as Result
from .analysis import analyze as analyze
from .curve import grid as grid
from .measure import measure_intrinsic_dimension as measure_intrinsic_dimension
from .report import write_report as write_report
