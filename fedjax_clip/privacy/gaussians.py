"""Gaussian mechanisms without sampling: composition, epsilon and splitting."""

import math
from collections.abc import Sequence

from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

from fedjax_clip.core import checks
from fedjax_clip.core.types import InvalidInput


def together(noise_multipliers: Sequence[float]) -> float:
    """The noise multiplier of several Gaussian mechanisms together: ``(sum_i z_i^-2)^(-1/2)``.

    Args:
      noise_multipliers: ``uplink.promises.noise_multipliers``, for example.

    Returns:
      The noise multiplier; 0, which is no privacy, if one mechanism has no noise or if there are none.

    Example:
      >>> round(fc.privacy.together([2.0, 2.0]), 4)
      1.4142
    """
    if not noise_multipliers or min(noise_multipliers) == 0:
        return 0.0
    return sum(z**-2 for z in noise_multipliers) ** -0.5


def split(noise_multiplier: float, bits_noise: float) -> float:
    """The noise multiplier left for updates, ``(z^-2 - (2 sigma_b)^-2)^(-1/2)``, if z also covers a quantile's bits.

    ``chain(quantile_clip(bits_noise=sigma_b), gaussian(split(z, sigma_b)))`` costs what ``gaussian(z)`` alone does:
    a bit minus one half has sensitivity 1/2, so its noise multiplier is 2 sigma_b.

    Args:
      noise_multiplier: z, of bits and updates together.
      bits_noise: sigma_b, in bits.

    Raises:
      InvalidInput: too little noise on the bits, which then alone cost more than z allows.

    Example:
      >>> round(fc.privacy.split(1.0, bits_noise=2.5), 4)
      1.0206

    Source: Andrew et al. (2021), Theorem 1.
    """
    checks.positive("noise_multiplier", noise_multiplier)
    checks.positive("bits_noise", bits_noise)
    if 2 * bits_noise <= noise_multiplier:
        raise InvalidInput(
            f"bits_noise={bits_noise:g} leaves nothing for the updates of a noise multiplier of {noise_multiplier:g}: "
            f"it must be over {noise_multiplier / 2:g}."
        )
    return (noise_multiplier**-2 - (2 * bits_noise) ** -2) ** -0.5


def exact(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism; k of them are one with noise multiplier ``z / sqrt(k)``.

    Source: Balle and Wang (2018), "Improving the Gaussian Mechanism for Differential Privacy", Theorem 8.
    """
    if noise_multiplier < 1e-5:  # beyond the range of floating point
        return math.inf
    return float(get_epsilon_gaussian(noise_multiplier, delta))
