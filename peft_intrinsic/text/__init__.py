"""Training on text: tasks, metrics, and trials with transformers' Trainer."""

from .options import TextOptions as TextOptions
from .training import TextFit as TextFit
