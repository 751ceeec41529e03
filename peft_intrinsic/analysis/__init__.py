"""Analysis of fine-tuned models: distance from the base and critical layers (Radiya-Dixit and Wang, arXiv 2004.14129),
outlier dimensions (Zhang, Liu, Shao 2023, arXiv 2305.17446)."""

from .critical import CriticalLayers as CriticalLayers
from .critical import critical_layers as critical_layers
from .critical import frozen_sweep as frozen_sweep
from .distance import Distances as Distances
from .distance import parameter_distance as parameter_distance
from .outliers import Outliers as Outliers
from .outliers import disable_outliers as disable_outliers
from .outliers import find_outliers as find_outliers
