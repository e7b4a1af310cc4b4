"""Chapter 5, deep dive on settings: the range test, the noise scale, and what a difference means."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from ch05_pretrain.choosing_settings import (
    chance_of_difference,
    critical_batch_size,
    find_learning_rate,
    gradient_noise_scale,
    steps_to_reach,
    visible_difference,
)
from ch05_pretrain.pretrain import SGD


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 4))


def learnable(seed=0, n=32):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(6, 4, generator=generator)

    def batch(size=n):
        x = torch.randn(size, 6, generator=generator)
        return x, (x @ direction).argmax(-1)
    return batch


def test_the_range_test_sees_nothing_then_learning_then_disaster():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    found = find_learning_rate(model, learnable(), steps=100, high=100.0)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()), "the model itself is left alone"
    assert found.rates == sorted(found.rates) and found.rates[0] == 1e-5
    assert abs(found.losses[5] - found.losses[0]) < 0.1 * found.losses[0], "nothing at first"
    assert min(found.losses) < 0.6 * found.losses[0], "then it learns"
    assert found.rates[-1] < 100.0 and found.losses[-1] > min(found.losses), "and stops when it explodes"
    assert 1e-3 < found.suggestion < found.rates[int(np.argmin(found.losses))]


def test_the_suggestion_is_where_the_fall_is_steepest_and_the_rates_are_geometric():
    found = find_learning_rate(classifier(), learnable(), lambda p, lr: SGD(p, lr), low=1e-4, high=1e1, steps=51)
    assert found.rates[10] / found.rates[0] == pytest.approx(10)
    slopes = np.diff(found.losses)
    assert abs(found.rates.index(found.suggestion) - int(np.argmin(slopes))) <= 2


def test_a_range_without_sense_is_refused():
    for bad in ({"low": 0.0}, {"low": 1.0, "high": 0.1}, {"steps": 5}):
        with pytest.raises(ValueError, match="low must be above 0 and below high, steps 10 or more"):
            find_learning_rate(classifier(), learnable(), **bad)
    with pytest.raises(ValueError, match="exploded after 1 steps.*lower low"):
        find_learning_rate(classifier(), learnable(), lambda p, lr: SGD(p, lr), low=1e6, high=1e9)


class Point(nn.Module):
    """Loss |w - x|²/2: the gradient of one x is w - x, so signal |w|² and noise d sigma² are known."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.w - x


def half_square(difference, _):
    return 0.5 * difference.square().sum(-1).mean()


@pytest.mark.parametrize(("small", "big"), [(1, 8), (4, 64), (8, 16)])
def test_the_noise_scale_of_a_known_problem(small, big):
    generator = torch.Generator().manual_seed(0)
    model = Point(torch.ones(20))
    result = gradient_noise_scale(model, lambda n: (3 * torch.randn(n, 20, generator=generator), None), small, big,
                                  repeats=12_000 // big, loss=half_square)
    assert result.signal == pytest.approx(20, rel=0.06)
    assert result.noise == pytest.approx(180, rel=0.06)
    assert result.scale == pytest.approx(result.noise / result.signal)
    assert model.w.grad is None and torch.equal(model.w, torch.ones(20))


def test_without_noise_the_scale_is_zero_and_without_signal_it_is_huge():
    still = gradient_noise_scale(Point(torch.ones(4)), lambda n: (torch.zeros(n, 4), None), loss=half_square)
    assert still.signal == pytest.approx(4) and still.noise == pytest.approx(0, abs=1e-5)
    generator = torch.Generator().manual_seed(1)
    lost = gradient_noise_scale(Point(torch.zeros(4)), lambda n: (torch.randn(n, 4, generator=generator), None),
                                repeats=50, loss=half_square)
    assert lost.scale > 300
    for bad in ({"small": 3}, {"small": 64, "big": 64}, {"small": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match="small must divide big and be less"):
            gradient_noise_scale(Point(torch.ones(4)), lambda n: None, **bad)


def test_the_critical_batch_size_is_read_off_the_law():
    sizes = (2, 8, 32, 128)
    assert critical_batch_size(sizes, [50 * (1 + 12 / b) for b in sizes]) == pytest.approx((12, 50))
    noisy = [50 * (1 + 12 / b) * f for b, f in zip(sizes, (1.03, 0.97, 1.02, 0.98), strict=True)]
    assert critical_batch_size(sizes, noisy)[0] == pytest.approx(12, rel=0.2)
    with pytest.raises(ValueError, match="do not follow the law"):
        critical_batch_size(sizes, [10, 20, 30, 40])
    for bad in (((4, 4), (10, 10)), ((4, 8), (10,))):
        with pytest.raises(ValueError, match="at least two different sizes"):
            critical_batch_size(*bad)


def test_the_step_at_which_a_loss_is_reached():
    losses = [5.0, 4.0, 3.0, 2.0, 3.0]
    assert steps_to_reach(losses, 3.0) == 3 and steps_to_reach(losses, 5.0) == 1
    assert steps_to_reach(losses, 3.0, width=2) == 4, "the mean of 3 and 2 is the first below"
    assert steps_to_reach(losses, 1.0) is None and steps_to_reach(losses, 9.0, width=6) is None


def test_a_visible_difference_is_rarely_luck():
    random = np.random.default_rng(0)
    for n in (1, 4):
        means = random.normal(0, 0.1, (2, 20_000, n)).mean(axis=2)
        alarms = np.mean(np.abs(means[0] - means[1]) > visible_difference(0.1, n))
        assert 0.001 < alarms < 0.006  # three standard deviations: 0.27 %
    assert visible_difference(0.2, 8) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="seeds is 0"):
        visible_difference(0.1, 0)


def test_chance_counted_by_hand():
    assert chance_of_difference([1, 2], [3, 4]) == pytest.approx(2 / 6)
    assert chance_of_difference([1, 2], [3, 4], paired=True) == pytest.approx(2 / 4)
    assert chance_of_difference([1, 2, 3], [1, 2, 3]) == 1.0
    eight = np.arange(8.0)
    assert chance_of_difference(eight, eight + 100) == pytest.approx(2 / math.comb(16, 8))
    assert chance_of_difference(eight, eight + 0.1, paired=True) == pytest.approx(2 / 256)
    assert chance_of_difference(eight, eight + 0.1) > 0.9, "without pairs the spread hides it"


def test_without_a_difference_chance_is_even():
    random = np.random.default_rng(0)
    for paired in (False, True):
        found = [chance_of_difference(*random.normal(0, 1, (2, 5)), paired=paired) for _ in range(300)]
        assert 0.4 < np.mean(found) < 0.65 and np.mean(np.array(found) <= 0.1) < 0.16


def test_too_few_or_too_many_results_are_refused():
    with pytest.raises(ValueError, match="1 and 3 results; give at least 2 of each"):
        chance_of_difference([1], [1, 2, 3])
    with pytest.raises(ValueError, match="2 and 3 results.*as many if they are paired"):
        chance_of_difference([1, 2], [1, 2, 3], paired=True)
    with pytest.raises(ValueError, match="at most 1,000,000"):
        chance_of_difference(range(20), range(20))
