"""Deep dive: How much data a model needs.

Written from ch01_data/how_much_data.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "training_flops",
    "LossLaw",
    "HOFFMANN",
    "BESIROGLU",
    "effective_tokens",
    "mixture_weights",
]

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp


def training_flops(n_parameters: float, n_tokens: float) -> float:
    """Floating point operations of training: 6 for each parameter and token (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * n_parameters * n_tokens


@dataclass(frozen=True)
class LossLaw:
    """The loss of a model by its size and its data: E + A / N^alpha + B / D^beta, in nats per token.

    Hoffmann et al. 2022, section 3.3, equation 2. N counts parameters, D training tokens.
    """

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n_parameters, n_tokens):
        """Predicted loss (nats per token) after one pass over ``n_tokens`` different tokens."""
        return self.e + self.a / n_parameters**self.alpha + self.b / n_tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """The (parameters, tokens) with the lowest loss among all with 6 N D = ``flops``; equation 4."""
        if flops <= 0:
            raise ValueError(f"flops is {flops}; a training bill must be above 0, for instance 1e21.")
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n_parameters = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n_parameters, flops / 6 / n_parameters


HOFFMANN = LossLaw(1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = LossLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def effective_tokens(unique: float, seen: float, decay: float = 15.4) -> float:
    """How many fresh tokens ``seen`` tokens are worth of which only ``unique`` are different.

    Muennighoff et al. 2023, section 3.1, with R = seen / unique - 1 repetitions; without repetition it is
    ``seen`` itself. ``ValueError`` where ``unique`` is not above 0 or ``seen`` is negative.
    """
    if unique <= 0 or seen < 0:
        raise ValueError(f"unique is {unique} and seen is {seen}: there must be some text, so unique above 0, "
                         "and seen at least 0.")
    if seen <= unique:
        return seen
    return unique + unique * decay * (1 - exp(-(seen / unique - 1) / decay))


def mixture_weights(sizes: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """Share of each source in training, proportional to size ** (1 / temperature); they add up to 1.

    Temperature 1 is proportional to size, infinity is equal shares (Conneau et al. 2020, section 3.1, with
    alpha = 1 / temperature). ``ValueError`` for a temperature below 1 or a size that is not above 0.
    """
    if not temperature >= 1:
        raise ValueError(f"temperature is {temperature}; it must be at least 1 (1: as the sizes are, large: equal).")
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"The source {name!r} has size {size}; it must be above 0. Leave empty sources out.")
    largest = max(sizes.values(), default=1)
    powers = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}
