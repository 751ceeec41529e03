"""Trials: engines that run them, and the store of their rows."""

from .engine import Engine as Engine
from .engine import RayEngine as RayEngine
