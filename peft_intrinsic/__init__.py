"""Fine-tune a model through a handful of numbers. Importing this package registers the tuner with PEFT."""

from .tuner import IntrinsicConfig as IntrinsicConfig
from .tuner import IntrinsicModel as IntrinsicModel
from .tuner import register
from .version import __version__ as __version__

register()
