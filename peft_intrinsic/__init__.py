"""Fine-tune a pretrained model by training only d parameters. Importing the package registers it with PEFT."""

from .supermask import SupermaskConfig as SupermaskConfig
from .supermask import SupermaskModel as SupermaskModel
from .tuner import AdapterBank as AdapterBank
from .tuner import IntrinsicConfig as IntrinsicConfig
from .tuner import IntrinsicModel as IntrinsicModel
from .tuner import RowAdam as RowAdam
from .tuner import convert_to_lora as convert_to_lora
from .tuner import init_head_from_labels as init_head_from_labels
from .tuner import register, register_method
from .tuner import save_as_lora as save_as_lora
from .version import __version__ as __version__

register()
register_method("SUPERMASK", SupermaskConfig, SupermaskModel)
