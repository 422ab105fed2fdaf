"""The kinds of numbers that keys may have: all of them finite, which jsonargparse's own need not be."""

import math
from typing import TYPE_CHECKING

from jsonargparse.typing import restricted_number_type

if TYPE_CHECKING:
    Dropout = float
    NonNegativeFloat = float
    PositiveFloat = float
    PositiveFraction = float
else:
    # jsonargparse's own names are taken.
    Dropout = restricted_number_type("Dropout", float, [(">=", 0), ("<", 1)])
    NonNegativeFloat = restricted_number_type("FiniteNonNegativeFloat", float, [(">=", 0), ("<", math.inf)])
    PositiveFloat = restricted_number_type("FinitePositiveFloat", float, [(">", 0), ("<", math.inf)])
    PositiveFraction = restricted_number_type("PositiveFraction", float, [(">", 0), ("<=", 1)])
