"""What the tasks' paired bootstraps have in common: examples are drawn again, and means compared with zero."""

import numpy as np


def two_sided_p(means_R: np.ndarray) -> float:
    """The p-value of a difference from the means (R,) of R resamples: twice the share on its rarer side of zero.

    One resample more counts on that side, so it is never zero (Koehn 2004, "Statistical Significance Tests for Machine
    Translation Evaluation"; Davison and Hinkley 1997, section 4.2).
    """
    rarer_side = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return min(1.0, 2 * (rarer_side + 1) / (len(means_R) + 1))
