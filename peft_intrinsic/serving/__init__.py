"""Serving many adapters: stores of adapters by name, and their exact form as LoRAs for servers that know LoRA alone."""

from .expand import LoraExpander as LoraExpander
from .store import AdapterStore as AdapterStore
from .store import open_store as open_store
