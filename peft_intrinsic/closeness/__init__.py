"""How near a fine-tuned model is to its base, and which layers matter (Radiya-Dixit and Wang, arXiv 2004.14129)."""

from .critical import CriticalLayers as CriticalLayers
from .critical import critical_layers as critical_layers
from .critical import frozen_sweep as frozen_sweep
from .distance import Distances as Distances
from .distance import parameter_distance as parameter_distance
