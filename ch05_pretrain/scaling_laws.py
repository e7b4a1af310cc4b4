"""Deep dive: Scaling laws.

Written from ch05_pretrain/scaling_laws.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "GRID_SIZES",
    "GRID",
    "REPEATED",
    "grid_recipe",
    "grid_parameters",
    "GRID_RECORD",
    "grid_run",
    "planned_grid",
    "read_grid",
    "complete_grid",
    "Valley",
    "valley",
    "power_law",
    "LawFits",
    "law_errors",
    "huber",
    "STARTS",
    "fit_loss_law",
    "bootstrap_laws",
    "Bill",
    "training_bill",
]

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ch01_data.how_much_data import LossLaw, training_flops
from ch04_gpt.gpt import count_parameters
from ch05_pretrain.speed_run import CharacterText, Recipe, TimedRun, build_from_recipe, held_out_loss
from ch05_pretrain.speed_run import shakespeare_characters
from utils.progress import progress
from utils.workspace import ROOT, write_text


GRID_SIZES = {"8x1": (8, 1), "16x1": (16, 1), "16x2": (16, 2), "24x2": (24, 2), "32x2": (32, 2), "48x2": (48, 2),
              "64x2": (64, 2), "96x2": (96, 2)}  # width and layers
GRID = {  # which sizes are trained for which bill, in floating point operations
    1e10: ("8x1", "16x1", "16x2", "24x2", "32x2"),
    3e10: ("16x1", "16x2", "24x2", "32x2", "48x2"),
    1e11: ("16x2", "24x2", "32x2", "48x2", "64x2", "96x2"),
    2e11: ("24x2", "32x2", "48x2", "64x2"),
}
REPEATED = (("16x1", 1e10), ("24x2", 1e10), ("32x2", 3e10))  # with two further seeds


def grid_recipe(size: str, flops: float = 1e10) -> Recipe:
    """The modern recipe of the speed run at another size, for as many steps as the bill 6 N D allows."""
    d_model, n_layers = GRID_SIZES[size]
    recipe = Recipe(steps=1, batch_size=16, d_model=d_model, n_layers=n_layers, n_heads=max(1, d_model // 16),
                    optimizer="muon", max_lr=0.01, min_lr=0.0, matrix_lr=0.03, warmup_steps=10, schedule="linear",
                    position="rope", norm="bare", qk_norm=True, mlp="relu2", zero_init=True)
    n_parameters = grid_parameters(recipe)[0]
    steps = round(flops / training_flops(n_parameters, recipe.tokens))
    return Recipe(**{**asdict(recipe), "steps": steps})


def grid_parameters(recipe: Recipe, vocab_size: int = 83) -> tuple[int, int]:
    """How many parameters a recipe's model has, with and without its table of characters."""
    n = count_parameters(build_from_recipe(recipe, vocab_size))
    return n, n - vocab_size * recipe.d_model


GRID_RECORD = ROOT / "ch05_pretrain" / "records" / "scaling_grid.json"


def grid_run(size: str, flops: float, text: CharacterText, seed: int = 0) -> dict:
    """Train one model of the grid: its size, its text, its held-out loss in nats per character."""
    recipe = grid_recipe(size, flops)
    run = TimedRun(recipe, text, seed)
    for _ in range(recipe.steps):
        run.step()
    with_table, without = grid_parameters(recipe, len(text.letters))
    return {"size": size, "flops": flops, "seed": seed, "parameters": with_table, "without_table": without,
            "tokens": recipe.tokens, "loss": round(held_out_loss(run.model, text, every=4), 4),
            "cpu_seconds": round(sum(run.cpu_seconds), 1)}


def planned_grid() -> list[tuple[str, float, int]]:
    """Every run of the grid, cheap bills first: (size, bill, seed)."""
    once = [(size, flops, 0) for flops, sizes in GRID.items() for size in sizes]
    return once + [(size, flops, seed) for size, flops in REPEATED for seed in (1, 2)]


def read_grid(path: Path = GRID_RECORD) -> list[dict]:
    """The recorded runs, as ``grid_run`` returns them."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def complete_grid() -> None:
    """Train what the record lacks, and write it after every run: stop it at any time and start it again."""
    text, runs = shakespeare_characters(), read_grid()
    known = {(run["size"], run["flops"], run["seed"]) for run in runs}
    for plan in progress([plan for plan in planned_grid() if plan not in known], "Training the grid"):
        size, flops, seed = plan
        runs.append(grid_run(size, flops, text, seed))
        write_text(GRID_RECORD, json.dumps({"runs": runs}, indent=1) + "\n")


@dataclass(frozen=True)
class Valley:
    """A parabola of loss over ln N through the runs of one bill, and its lowest point."""

    flops: float
    coefficients: np.ndarray
    n_parameters: float
    loss: float


def valley(n, loss, flops: float) -> Valley:
    """The parabola through (ln N, loss), by least squares. Hoffmann et al. 2022, section 3.2 (IsoFLOP profiles).

    ``ValueError`` if it has no lowest point, or fewer than three sizes.
    """
    sizes = len(np.unique(n))
    if sizes < 3:
        raise ValueError(f"A parabola needs runs of at least 3 sizes, and there are {sizes}.")
    coefficients = np.polyfit(np.log(n), loss, 2)
    if coefficients[0] <= 0:
        raise ValueError(f"The runs at {flops:.0e} operations have no lowest point between them: add sizes.")
    lowest = -coefficients[1] / (2 * coefficients[0])
    return Valley(flops, coefficients, math.exp(lowest), float(np.polyval(coefficients, lowest)))


def power_law(x, y) -> tuple[float, float]:
    """The straight line through logarithms: (exponent, factor) of y = factor * x ** exponent."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(math.exp(log_factor))


@dataclass(frozen=True)
class LawFits:
    """Fitted laws, one a row: (n, 5) numbers ln E, ln A, ln B, alpha, beta, and what is left of the objective (n,)."""

    values: np.ndarray
    objective: np.ndarray

    def law(self, row: int) -> LossLaw:
        """Row ``row`` as a law of chapter 1."""
        e, a, b, alpha, beta = self.values[row]
        return LossLaw(math.exp(e), math.exp(a), math.exp(b), alpha, beta)

    def best(self) -> LossLaw:
        """The law with the smallest objective."""
        return self.law(int(self.objective.argmin()))


def law_errors(values: np.ndarray, n: np.ndarray, d: np.ndarray,
               log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far ln L(N, D) is from the data, (k, runs), and its derivatives by the five numbers, (k, runs, 5)."""
    e, a, b, alpha, beta = (column[:, None] for column in values.T)
    terms = np.stack([e + 0 * n, a - alpha * np.log(n), b - beta * np.log(d)], axis=-1)  # logarithms of the summands
    log_sum = np.logaddexp.reduce(terms, axis=-1)
    floor, size, data = np.moveaxis(np.exp(terms - log_sum[..., None]), -1, 0)  # each summand's share of the loss
    slopes = np.stack([floor, size, data, -size * np.log(n), -data * np.log(d)], axis=-1)
    return log_sum - log_loss, slopes


def huber(errors: np.ndarray, delta: float) -> np.ndarray:
    """error² / 2 up to ``delta``, then a straight line: a bad run counts, but not by its square."""
    size = np.abs(errors)
    return np.where(size <= delta, errors**2 / 2, delta * (size - delta / 2))


STARTS = [(e, a, b, alpha, beta) for e in (-1.0, 0.3) for a in (1.0, 4.0) for b in (1.0, 4.0)
          for alpha in (0.3, 0.8) for beta in (0.3, 0.8)]


def fit_loss_law(n, d, loss, starts=STARTS, weights=None, delta: float = 1e-3, steps: int = 300) -> LawFits:
    """Fit L = E + A / N^alpha + B / D^beta to runs: Huber error of ln L, as Hoffmann et al. 2022, appendix D.2.

    n, d, loss: (runs,). ``starts`` (k, 5): every one is followed by damped Gauss-Newton steps (Levenberg and
    Marquardt); ``weights`` (runs,) or (k, runs) counts runs, for the bootstrap. ``ValueError`` for fewer than five
    runs or a value that is not above 0.
    """
    n, d, log_loss = (np.asarray(x, dtype=float) for x in (n, d, np.log(np.maximum(loss, 1e-300))))
    if len(n) < 5 or not (n > 0).all() or not (d > 0).all() or not (np.asarray(loss) > 0).all():
        raise ValueError(f"{len(n)} runs, of which sizes, tokens and losses must all be above 0: five unknowns "
                         "need at least five runs.")
    values = np.array(starts, dtype=float)
    weights = np.broadcast_to(np.ones(len(n)) if weights is None else weights, (len(values), len(n)))
    damping = np.full(len(values), 1e-2)
    errors, slopes = law_errors(values, n, d, log_loss)
    objective = (weights * huber(errors, delta)).sum(-1)
    for _ in range(steps):
        pull = weights * np.minimum(1, delta / np.maximum(np.abs(errors), 1e-12))  # Huber as weighted squares
        square = np.einsum("kr,kri,krj->kij", pull, slopes, slopes)
        right = np.einsum("kr,kri,kr->ki", pull, slopes, errors)
        scale = np.einsum("kii->ki", square)[:, :, None] * np.eye(5) + 1e-12 * np.eye(5)
        trial = values - np.linalg.solve(square + damping[:, None, None] * scale, right[..., None])[..., 0]
        trial = np.clip(trial, (-20, -20, -20, 0.01, 0.01), (3, 20, 20, 3, 3))
        new_errors, new_slopes = law_errors(trial, n, d, log_loss)
        new_objective = (weights * huber(new_errors, delta)).sum(-1)
        better = new_objective < objective
        values[better], errors[better] = trial[better], new_errors[better]
        slopes[better], objective[better] = new_slopes[better], new_objective[better]
        damping = np.clip(np.where(better, damping / 3, damping * 3), 1e-9, 1e9)
    return LawFits(values, objective)


def bootstrap_laws(n, d, loss, best: LossLaw, n_samples: int = 400, seed: int = 0, **options) -> LawFits:
    """``n_samples`` fits, each to as many runs drawn anew with replacement, all started at the ``best`` fit."""
    chosen = np.random.default_rng(seed).integers(len(n), size=(n_samples, len(n)))
    weights = np.stack([np.bincount(row, minlength=len(n)) for row in chosen])
    start = [math.log(best.e), math.log(best.a), math.log(best.b), best.alpha, best.beta]
    return fit_loss_law(n, d, loss, np.tile(start, (n_samples, 1)), weights, **options)


@dataclass(frozen=True)
class Bill:
    """What a training run costs: operations, hours of all devices together, days on the clock, money."""

    flops: float
    device_hours: float
    days: float
    price: float


def training_bill(flops: float, *, peak: float, utilisation: float, n_devices: int, price_per_hour: float) -> Bill:
    """The bill for ``flops`` operations on ``n_devices`` devices that do ``peak`` operations a second at best.

    ``utilisation`` is the share of the peak that training reaches, ``price_per_hour`` is for one device, in any
    currency. ``ValueError`` for a value that makes no sense.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}; it is a share, above 0 and at most 1.")
    if not flops > 0 or not peak > 0 or n_devices < 1 or price_per_hour < 0:
        raise ValueError(f"flops {flops}, peak {peak}, n_devices {n_devices} and price_per_hour {price_per_hour}: "
                         "the first two must be above 0, devices at least 1, and the price not negative.")
    device_hours = flops / (peak * utilisation) / 3600
    return Bill(flops, device_hours, device_hours / n_devices / 24, device_hours * price_per_hour)


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    complete_grid()
