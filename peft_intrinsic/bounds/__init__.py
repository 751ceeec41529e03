"""Bounds on the error or loss on new examples, from that in training and the size of a packed adapter."""

from .certificate import CONDITIONS as CONDITIONS
from .certificate import Certificate as Certificate
from .formulas import catoni as catoni
from .formulas import clopper_pearson as clopper_pearson
from .formulas import hoeffding as hoeffding
from .formulas import kl_inverse as kl_inverse
from .formulas import mcallester as mcallester
from .formulas import occam as occam
from .formulas import prefix_free as prefix_free
from .formulas import seeger as seeger
from .formulas import smoothed_span as smoothed_span
from .formulas import subsampled as subsampled
from .language import LANGUAGE_CONDITIONS as LANGUAGE_CONDITIONS
from .language import LanguageCertificate as LanguageCertificate
