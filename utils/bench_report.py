"""What ``course.py bench`` prints, draws and writes of what it measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from .bench import COURSE, Growth, Measurement, Row, exponent, is_peer, machine, measure, reached, shares, times_as_fast
from .plots import figure, save
from .workspace import ROOT, short_path, workspace, write_text

Item = Row | Growth
SAID = {"times": "{:.2f} times as fast as the fastest peer", "cpu times": "{:.2f} times as fast in CPU time",
        "share": "{:.0%} of the machine's own rate", "rate": "{:.2f} {unit}/s"}
AIM = {"times": "{:g} times", "cpu times": "{:g} times", "share": "{:.0%}", "rate": "{:g} {unit}/s"}


def compare(items: Sequence[Item], rounds: int, name: str, size: str) -> Path:
    """Measure all rows; print tables, and write ``workspace/bench/name.json`` and ``.png``."""
    about = machine()
    print(f"{name}: {about['processor']}, {about['cores']} cores, Python {about['python']}; "
          f"{rounds} interleaved {'rounds' if rounds > 1 else 'round'}, medians (least to most)\n")
    folder, results = workspace("bench"), []
    for item in items:
        measured = measure(item.jobs(), min(rounds, item.rounds or rounds), item.work, getattr(item, "warm_up", True))
        growth = isinstance(item, Growth)
        print((_growth_table if growth else _table)(item, measured), end="\n\n", flush=True)
        results.append((_growth_record if growth else _record)(item, measured))
    document = {"machine": about, "date": date.today().isoformat(), "sizes": size, "rounds": rounds, "rows": results}
    write_text(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
    save(_draw(results), folder / f"{name}.png")
    print(f"Written to {short_path(folder / name)}.json and .png\n")
    return folder / f"{name}.json"


# ---------------------------------------------------------------- tables and records


def _numbers(measured: Measurement) -> dict:
    return {"wall_seconds": measured.wall, "cpu_seconds": measured.cpu, "peak_memory_bytes": measured.memory}


def _record(row: Row, measured: Mapping[str, Measurement]) -> dict:
    aims = [{"who": aim.who, "kind": aim.kind, "least": aim.least, "reached": reached(row, measured, aim)}
            for aim in row.aims]
    return {"work": row.work, "size": row.size, "unit": row.unit, "aims": aims,
            "contenders": {name: _numbers(m) for name, m in measured.items()},
            "times_as_fast": times_as_fast(measured) if COURSE in measured else {},
            "share_of_the_machine": shares(measured)}


def _growth_record(growth: Growth, measured: Mapping[tuple, Measurement]) -> dict:
    curves = {}
    for name in growth.functions:
        points = [measured[name, size] for size in growth.sizes]
        slope, least, most = exponent(growth.sizes, points)
        curves[name] = {"exponent": slope, "least": least, "most": most, "expected": growth.expected[name],
                        "points": [{"size": s} | _numbers(m) for s, m in zip(growth.sizes, points, strict=True)]}
    return {"work": growth.work, "unit": growth.unit, "flat_memory": growth.flat_memory, "growth": curves}


def _table(row: Row, measured: Mapping[str, Measurement]) -> str:
    width = max(map(len, measured))
    lines = [f"{row.work} ({row.size:.4g} {row.unit})",
             f"  {'':{width}} {'wall s':>22} {'cpu s':>22} {row.unit + '/s':>12} {'peak MB':>9}"]
    for name, m in measured.items():
        wall, cpu = (f"{statistics.median(t):.3f} ({min(t):.3f} to {max(t):.3f})" for t in (m.wall, m.cpu))
        rate = row.size / statistics.median(m.wall)
        lines.append(f"  {name:{width}} {wall:>22} {cpu:>22} {rate:12.2f} {m.memory / 1e6:9.0f}")
    for kind, times in (times_as_fast(measured) if COURSE in measured else {}).items():
        lines.append(f"  {kind + ' time:':10} {times:.2f} times as fast as the fastest peer")
    for limit, share in shares(measured).items():
        lines += [f"  share of {limit}: " + ", ".join(f"{name} {value:.0%}" for name, value in share.items())
                  ] if share else []
    for aim in row.aims:
        lines.append("  " + _verdict(row.unit, {"who": aim.who, "kind": aim.kind, "least": aim.least,
                                                "reached": reached(row, measured, aim)}))
    return "\n".join(lines)


def _verdict(unit: str, aim: Mapping) -> str:
    said = SAID[aim["kind"]].format(aim["reached"], unit=unit)
    wanted = AIM[aim["kind"]].format(aim["least"], unit=unit)
    return f"{aim['who']}: {said}; aim {wanted}, {'reached' if aim['reached'] >= aim['least'] else 'not reached'}"


def _growth_table(growth: Growth, measured: Mapping[tuple, Measurement]) -> str:
    lines = [f"{growth.work}", "  " + f"{growth.unit:>14}" + "".join(
        f"  {name + ', s':>30} {'peak MB':>9}" for name in growth.functions)]
    for size in growth.sizes:
        cells = [measured[name, size] for name in growth.functions]
        lines.append(f"  {size:14,g}" + "".join(
            f"  {statistics.median(m.wall):30.3f} {m.memory / 1e6:9.0f}" for m in cells))
    for name, curve in _growth_record(growth, measured)["growth"].items():
        lines.append(f"  {name}: time grows like size^{curve['exponent']:.2f} "
                     f"(rounds {curve['least']:.2f} to {curve['most']:.2f}; claimed at most {curve['expected']:g})")
        if growth.flat_memory:
            peaks = [point["peak_memory_bytes"] for point in curve["points"]]
            lines.append(f"  {name}: peak memory at the largest size {max(peaks) / peaks[0]:.2f} times that at the "
                         "smallest")
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures


def _draw(results: Sequence[dict]):
    heights = [2.6 if "growth" in row else 0.75 + 0.36 * len(row["contenders"]) for row in results]
    fig, panels = figure(nrows=len(results), height=sum(heights) + 0.3, squeeze=False,
                         gridspec_kw={"height_ratios": heights})
    for axes, row in zip(panels[:, 0], results, strict=True):
        (_draw_growth if "growth" in row else _draw_row)(axes, row)
    return fig


def _draw_row(axes, row: Mapping) -> None:
    names = list(row["contenders"])
    for shift, kind, hatch in ((-0.19, "wall_seconds", ""), (0.19, "cpu_seconds", "//")):
        values = [statistics.median(row["contenders"][name][kind]) for name in names]
        bars = axes.barh([i + shift for i in range(len(names))], values, 0.36, hatch=hatch, edgecolor="white",
                         label=kind.replace("_seconds", ""))
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set(title=row["work"], xlabel="seconds (median)")
    axes.legend()


def _draw_growth(axes, row: Mapping) -> None:
    for name, curve in row["growth"].items():
        axes.loglog([point["size"] for point in curve["points"]],
                    [statistics.median(point["wall_seconds"]) for point in curve["points"]], marker="o",
                    label=f"{name}: exponent {curve['exponent']:.2f}")
    axes.set(title=row["work"], xlabel=row["unit"], ylabel="seconds")
    axes.legend()


# ---------------------------------------------------------------- the page and the README

RECORD = ROOT / "docs" / "measurements.json"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def save_measurements(names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Take the last full figures of every bench into ``docs/measurements.json``, its page and the README.

    ``ValueError`` if one of them has not been measured in full, or not on the same machine as the others.
    """
    folder, documents = folder or workspace("bench"), {}
    for name in names:
        path = folder / f"{name}.json"
        documents[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sizes": "no"}
        if documents[name]["sizes"] != "full":
            raise ValueError(f"{name} has {documents[name]['sizes']} figures; run `course.py bench {name}` first.")
    if len({json.dumps(document["machine"]) for document in documents.values()}) > 1:
        raise ValueError("The figures are of different machines; run `course.py bench all --save` on one.")
    write_text(RECORD, json.dumps(documents, separators=(",", ":")) + "\n")
    pages = {ROOT / "docs" / "measurements.md": page_block, ROOT / "README.md": readme_block}
    for path, block in pages.items():
        write_text(path, with_block(path.read_text(encoding="utf-8"), block(documents)))
    return [short_path(path) for path in (RECORD, *pages)]


def with_block(text: str, block: str) -> str:
    """``text`` with what stands between the two marks replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"The page needs {BEGIN} and {END} once each, to say where the figures go.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def readme_block(documents: Mapping[str, Mapping]) -> str:
    """The rows that have an aim, one line each."""
    lines = ["| work | against | this course | aim |", "|---|---|---|---|"]
    for row in _all(documents):
        for aim in row.get("aims", []):
            lines.append(_aim_line(row, aim))
    return "\n".join(lines + ["", _measured_on(documents)])


def page_block(documents: Mapping[str, Mapping]) -> str:
    """Everything that was measured, bench by bench."""
    parts = [_measured_on(documents)]
    for name, document in documents.items():
        parts.append(f"## {name.capitalize()}")
        rows = [row for row in document["rows"] if "contenders" in row]
        parts += [_limits(rows)] if name == "limits" else [_markdown(row) for row in rows]
        parts += [_growth_markdown(row) for row in document["rows"] if "growth" in row]
    return "\n\n".join(parts)


def _all(documents: Mapping[str, Mapping]) -> list[dict]:
    return [row for document in documents.values() for row in document["rows"]]


def _measured_on(documents: Mapping[str, Mapping]) -> str:
    about = next(iter(documents.values()))["machine"]
    days = sorted({document["date"] for document in documents.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (f"*Measured on {about['processor']}, {about['cores']} cores, {about['system']}, Python "
            f"{about['python']}, {when}, by `python3 course.py bench all --save`.*")


def _median(row: Mapping, name: str, kind: str = "wall_seconds") -> float:
    return statistics.median(row["contenders"][name][kind])


def _fastest_peer(row: Mapping) -> str:
    return min((name for name in row["contenders"] if is_peer(name)), key=lambda name: _median(row, name))


def _aim_line(row: Mapping, aim: Mapping) -> str:
    against = {"times": "", "cpu times": ", CPU time", "share": "the machine's own rate", "rate": "itself"}[aim["kind"]]
    if aim["kind"] in ("times", "cpu times"):
        against = _fastest_peer(row) + against
    value, wanted = (AIM[aim["kind"]].format(_rounded(number, aim["kind"]), unit=row["unit"])
                     for number in (aim["reached"], aim["least"]))
    missed = "" if aim["reached"] >= aim["least"] else " (missed)"
    who = aim["who"].removeprefix(COURSE).removeprefix(", ")
    return f"| {row['work']}{', ' + who if who else ''} | {against} | **{value}** | {wanted}{missed} |"


def _rounded(number: float, kind: str) -> float:
    return number if kind == "share" else float(f"{number:.3g}")


def _limits(rows: Sequence[Mapping]) -> str:
    lines = ["| the machine itself | a second | medians of seconds |", "|---|---|---|"]
    for row in rows:
        (name, timing), = row["contenders"].items()
        lines.append(f"| {row['work']} | {_plain_number(row['size'] / _median(row, name))} {row['unit']} | "
                     f"{_spread(timing['wall_seconds'])} |")
    return "\n".join(lines)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def _markdown(row: Mapping) -> str:
    lines = [f"**{row['work']}** ({_plain_number(row['size'])} {row['unit']})\n",
             f"| | wall time, s | CPU time, s | {row['unit']}/s | peak memory | of the limit |",
             "|---|---|---|---|---|---|"]
    for name, timing in row["contenders"].items():
        rate = row["size"] / _median(row, name)
        share = max((share[name] for share in row["share_of_the_machine"].values() if name in share), default=None)
        lines.append(f"| {name} | {_spread(timing['wall_seconds'])} | {_spread(timing['cpu_seconds'])} | "
                     f"{_plain_number(rate)} | "
                     f"{timing['peak_memory_bytes'] / 1e6:,.0f} MB | {'' if share is None else f'{share:.0%}'} |")
    for aim in row["aims"]:
        lines.append(f"\n{_sentence(_verdict(row['unit'], aim))}")
    return "\n".join(lines)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _plain_number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _growth_markdown(row: Mapping) -> str:
    lines = [f"**{row['work']}**\n",
             "| | " + " | ".join(f"{point['size']:,.0f}" for point in next(iter(row["growth"].values()))["points"])
             + f" {row['unit']} | exponent | claimed at most |"]
    lines.append("|---" * (lines[-1].count("|") - 1) + "|")
    for name, curve in row["growth"].items():
        cells = [f"{statistics.median(p['wall_seconds']):.3g} s, {p['peak_memory_bytes'] / 1e6:,.0f} MB"
                 for p in curve["points"]]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | **{curve['exponent']:.2f}** "
                     f"({curve['least']:.2f} to {curve['most']:.2f}) | {curve['expected']:g} |")
    return "\n".join(lines)
