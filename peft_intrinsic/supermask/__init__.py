"""Fine-tuning by zeroing pretrained weights (Radiya-Dixit and Wang 2020, arXiv 2004.14129): the second tuner."""

from .config import SupermaskConfig as SupermaskConfig
from .model import SupermaskModel as SupermaskModel
