"""The PEFT tuner."""

from .config import IntrinsicConfig as IntrinsicConfig
from .lora import convert_to_lora as convert_to_lora
from .lora import save_as_lora as save_as_lora
from .mixed import AdapterBank as AdapterBank
from .model import IntrinsicModel as IntrinsicModel
from .plugin import register as register
