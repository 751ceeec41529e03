"""Running trials: where they run, how their rows are stored and resumed."""

from .engine import Engine as Engine
from .engine import RayEngine as RayEngine
