"""Training on text: tasks, metrics, and trials with transformers' Trainer."""

from .training import TextFit as TextFit
from .training import text_fit as text_fit
