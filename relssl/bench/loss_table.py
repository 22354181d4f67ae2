"""The result of `relssl bench losses` as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from relssl.bench.table import aligned, ranged

MIB = 2**20


def text(result: Mapping[str, Any]) -> str:
    """All cases of a result, each with its table, the differences of the forms and the rest of the step."""
    launches = "kernels" if result["settings"]["device"] != "cpu" else "operators"
    lines = [machine(result)]
    for measurement in result["measurements"]:
        lines += ["", f"{title(measurement)}: {measurement['title']}", *_table(measurement, launches)]
        lines += [f"  {line}" for line in _agreement(measurement)]
        lines += [f"  {line}" for step in measurement["steps"] for line in rest_of_step(measurement, step)]
    return "\n".join(lines)


def title(measurement: Mapping[str, Any]) -> str:
    """Name, sizes and dtype, and whether the sizes are the published ones."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in measurement["sizes"].items())
    note = "" if measurement["published_sizes"] else "; not the published sizes"
    return f"{measurement['case']} ({sizes}; {measurement['dtype']}{note})"


def machine(result: Mapping[str, Any]) -> str:
    """One line that says where and how it was measured, and what else ran."""
    settings, environment = result["settings"], result["environment"]
    where = ", ".join(environment["devices"]) if settings["device"] != "cpu" else environment["processor"]
    parts = [
        f"{settings['threads']} thread(s) of {where}" if settings["device"] == "cpu" else where,
        f"torch {environment['torch']}",
        f"{settings['rounds']} rounds, median (range)",
        *load(result),
        result["date"],
    ]
    return "; ".join(parts)


def load(result: Mapping[str, Any]) -> Iterator[str]:
    """The load of the machine before and after every case, where it is known."""
    known = [value for value in result["load"] if value is not None]
    if known:
        yield f"load average before {known[0]:.1f}, during {min(known[1:]):.1f} to {max(known[1:]):.1f}"


def rest_of_step(measurement: Mapping[str, Any], step: Mapping[str, Any]) -> Iterator[str]:
    """What share of a step the loss is, and what backward keeps of the backbone."""
    shares = ", ".join(f"{100 * share:.3g} % {name}" for name, share in reversed(step["share"].items()))
    ratios = ", ".join(f"{ratio:.2f} times as fast as with {name}" for name, ratio in step["ratio"].items())
    yield f"of a whole step with {step['backbone']}: {shares}; with ours the step is {ratios}"
    timed = "; ".join(
        f"{entry['images']:,} of {entry['side']} px{'' if entry['trains'] else ' without gradient'}"
        + (f" ({entry['images_timed']:,} timed, scaled)" if entry["images_timed"] < entry["images"] else "")
        for entry in step["passes"]
    )
    yield f"  forward and backward of it take {step['seconds']:.3g} s: {timed}"
    kept = [f"{entry['activation_bytes_per_image'] / 1024:,.0f}" for entry in step["passes"] if entry["trains"]]
    yield (
        f"  backward keeps {step['activation_bytes'] / MIB:,.0f} MiB of it besides the loss: {', '.join(kept)} KiB an "
        "image, counted on 2 and 4 images, scaled"
    )


def _table(measurement: Mapping[str, Any], launches: str) -> Iterator[str]:
    ratios = {entry["form"]: entry for entry in measurement["ratios"]}
    rows = [["", "ms a call", "peak MiB", launches, "ours is", "with less memory"]]
    for form in measurement["forms"]:
        milliseconds = {key: form["seconds"][key] * 1e3 for key in ("median", "min", "max")}
        cells = [
            form["name"],
            ranged(milliseconds, 1 if milliseconds["median"] >= 10 else 3),
            f"{form['peak_bytes'] / MIB:,.1f}",
            f"{form['launches']:,}",
        ]
        entry = ratios.get(form["name"])
        if entry is None:
            rows.append([*cells, "", ""])
            continue
        faster = f"{ranged(entry['time'], 2)} times as fast{_wanted(entry, 'time')}"
        rows.append([*cells, faster, f"{entry['memory']:.1f} times{_wanted(entry, 'memory')}"])
    return aligned(rows)


def _wanted(entry: Mapping[str, Any], what: str) -> str:
    return f", at least {entry['targets'][what]:g} wanted" if what in entry["targets"] else ""


def _agreement(measurement: Mapping[str, Any]) -> Iterator[str]:
    """How far the forms are apart, and how far they may be."""
    for entry in measurement["ratios"]:
        found = [(measurement["dtype"], entry["difference"]), ("fp64", entry["difference_in_fp64"])]
        apart = [
            f"loss {difference['loss']:.0e} (allowed {difference['tolerance']['loss']:.0e}), gradient "
            f"{difference['gradient']:.0e} (allowed {difference['tolerance']['gradient']:.0e}) in {dtype}"
            for dtype, difference in found
            if difference is not None
        ]
        yield f"{entry['form']} and ours differ by: {'; '.join(apart)}"
