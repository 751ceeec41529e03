"""Packed adapters: intrinsic adapters in about a hundred bytes."""

from .adapter import compress as compress
from .adapter import load_packed as load_packed
from .adapter import read_packed as read_packed
from .entropy import PRIORS as PRIORS
from .packed import PackedAdapter as PackedAdapter
from .quantize import quantization_aware as quantization_aware
from .text import adapter_from_string as adapter_from_string
from .text import adapter_to_string as adapter_to_string
from .text import qr_code as qr_code
