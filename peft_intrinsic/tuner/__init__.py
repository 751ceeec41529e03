"""The PEFT tuner."""

from .config import IntrinsicConfig as IntrinsicConfig
from .model import IntrinsicModel as IntrinsicModel
from .plugin import register as register
