"""Chapter 5, deep dive on precision: the bits of numbers, what a format keeps, and timing in turns."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ch05_pretrain import precision
from ch05_pretrain.precision import FORMATS, bits_value, number_bits, print_turns, survival, take_turns

FLOATS = st.floats(allow_nan=False, width=64)


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_float32_bits_are_those_of_the_machine(x):
    expected = format(struct.unpack("<I", struct.pack("<f", x))[0], "032b")
    assert number_bits(x, torch.float32).replace(" ", "") == expected


@settings(deadline=None)
@given(st.floats(width=16, allow_nan=False))
def test_float16_bits_are_numpys(x):
    expected = format(int(np.float16(x).view(np.uint16)), "016b")
    assert number_bits(x, torch.float16).replace(" ", "") == expected


@settings(deadline=None)
@given(FLOATS)
@example(0.0)
@example(-0.0)
@example(1e-45)
@example(6e-8)
@example(1e39)
@example(math.inf)
@example(-math.inf)
def test_the_value_of_the_bits_is_the_stored_number(x):
    for dtype, (exponent, fraction) in FORMATS.items():
        bits = number_bits(x, dtype)
        assert [len(part) for part in bits.split()] == [1, exponent, fraction]
        stored = torch.tensor(x, dtype=torch.float64).to(dtype).item()
        assert bits_value(bits) == stored and math.copysign(1, bits_value(bits)) == math.copysign(1, stored)


def test_every_16_bit_pattern():
    for dtype in (torch.float16, torch.bfloat16):
        exponent, _ = FORMATS[dtype]
        raw = torch.arange(-(2**15), 2**15, 37, dtype=torch.int32).to(torch.int16)
        for pattern, stored in zip(raw.tolist(), raw.view(dtype).double().tolist(), strict=True):
            bits = format(pattern % 2**16, "016b")
            value = bits_value(f"{bits[0]} {bits[1 : 1 + exponent]} {bits[1 + exponent :]}")
            assert value == stored or (math.isnan(value) and math.isnan(stored))


def test_by_hand():
    assert number_bits(1.0, torch.bfloat16) == "0 01111111 0000000"
    assert number_bits(-2.5, torch.float16) == "1 10000 0100000000"
    assert bits_value("0 00000 0000000001") == 2.0**-24 and bits_value("0 11111 0000000000") == math.inf
    assert bits_value("1 00000000 0000000") == 0 and math.isnan(bits_value("0 11111 1000000000"))
    with pytest.raises(ValueError, match="torch.float64 is not known here; there are torch.float32"):
        number_bits(1.0, torch.float64)


def test_survival_by_hand():
    values = torch.tensor([1.0, 0.0, 1e-6, -1e-9, 1e6, -3.0])  # the 0 is not counted
    assert survival(values, torch.float16) == pytest.approx({"whole": 0.4, "zero": 0.2, "coarse": 0.2, "infinite": 0.2})
    assert survival(values, torch.bfloat16) == pytest.approx({"whole": 1.0, "zero": 0, "coarse": 0, "infinite": 0})
    with pytest.raises(ValueError, match="All numbers are zero"):
        survival(torch.zeros(3), torch.float16)


@settings(deadline=None)
@given(st.lists(st.floats(min_value=2**-30, max_value=2**20, width=32), min_size=1, max_size=20))
def test_survival_against_the_bounds_of_the_format(values):
    info = torch.finfo(torch.float16)
    kept = survival(torch.tensor(values, dtype=torch.float64), torch.float16)
    with np.errstate(over="ignore"):
        halves = [float(np.float16(v)) for v in values]
    expected = {"zero": sum(h == 0 for h in halves), "infinite": sum(math.isinf(h) for h in halves),
                "coarse": sum(0 < h < info.smallest_normal for h in halves)}
    for name, count in expected.items():
        assert kept[name] == pytest.approx(count / len(values))
    assert sum(kept.values()) == pytest.approx(1)


class Clock:
    """Time that passes only when an action says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_actions_take_turns_and_medians_come_back(monkeypatch):
    clock, order = Clock(), []
    monkeypatch.setattr(precision, "time", clock)
    durations = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 5.0, 5.0, 50.0])}

    def action(name):
        def act():
            order.append(name)
            clock.now += next(durations[name])
        return act

    finished = []
    actions = {name: action(name) for name in durations}
    result = take_turns(actions, rounds=3, finish=lambda: finished.append(len(order)))
    assert result == {"a": 2.0, "b": 5.0}  # the first round is not counted, an outlier does not matter
    assert order == ["a", "b"] * 4 and finished == list(range(1, 9))


def test_waiting_for_the_device_counts(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(precision, "time", clock)

    def finish():
        clock.now += 3.0

    assert take_turns({"a": lambda: None}, rounds=2, finish=finish) == {"a": 3.0}


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 0; it must be at least 1"):
        take_turns({"a": lambda: None}, rounds=0)


def test_the_table_names_the_ratio(capsys):
    print_turns({"slow": 0.004, "fast": 0.001})
    lines = capsys.readouterr().out.splitlines()
    assert "4.00 ms    1.00 times" in lines[0] and "1.00 ms    4.00 times" in lines[1]
