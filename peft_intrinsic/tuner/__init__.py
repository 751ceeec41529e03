"""The PEFT tuner."""

from .bank import AdapterBank as AdapterBank
from .config import IntrinsicConfig as IntrinsicConfig
from .label_head import init_head_from_labels as init_head_from_labels
from .model import IntrinsicModel as IntrinsicModel
from .registration import register as register
from .registration import register_method as register_method
from .row_adam import RowAdam as RowAdam
from .to_lora import convert_to_lora as convert_to_lora
from .to_lora import save_as_lora as save_as_lora
