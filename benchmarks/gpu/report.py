"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import Figure, Results, of_stage, speed


def markdown(results: Results, figures: Sequence[Figure]) -> str:
    """The whole report; sections that were not run are absent."""
    parts = [_head(results), "## Targets\n\n" + _targets(figures), _stages(results)]
    for section in (
        _correctness(results),
        _sanitizer(results),
        _ceilings(results),
        _large_products(results),
        _rows(results),
        _small_products(results),
        _layers(results),
        _launches(results),
    ):
        if section:
            parts.append(section)
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += [
        "| " + " | ".join(cell.replace("\n", " ").replace("|", "/") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _head(results: Results) -> str:
    header = results["header"]
    title = f"# {header['device']}, torch {header['torch']}, CUDA {header['cuda']}\n"
    words = {
        "capability": "compute capability {}",
        "multiprocessors": "{} multiprocessors",
        "memory_gib": "{} GiB",
        "l2_mib": "L2 {} MiB",
        "driver": "driver {}",
        "nvcc": "nvcc {}",
        "python": "Python {}",
        "commit": "commit {}",
    }
    clocks = {
        "sm_clock_mhz": "SM {} MHz",
        "sm_clock_max_mhz": "SM at most {} MHz",
        "memory_clock_mhz": "memory {} MHz",
        "power_limit_w": "power limit {} W",
        "power_w": "{} W",
        "temperature_c": "{} °C",
    }
    lines = [
        title,
        f"- {header['date']}; " + _filled(words, header),
        f"- before: {_filled(clocks, header) or 'clocks could not be read'}",
    ]
    after = results.get("stages", {}).get("kernels", {}).get("results", {}).get("card_after")
    if after:
        lines.append(f"- after: {_filled(clocks, after)}")
    lines.append(f"- `{results['command']}`, {results['seconds']:.0f} s")
    return "\n".join(lines) + "\n"


def _filled(words: dict[str, str], values: Results) -> str:
    return ", ".join(
        form.format(values[name]) for name, form in words.items() if values.get(name) is not None
    )


def _targets(figures: Sequence[Figure]) -> str:
    return _table(
        ("", "what", "target", "measured", "verdict"),
        [[f.number, f.what, f.target, f.measured, f.verdict] for f in figures],
    )


def _stages(results: Results) -> str:
    rows = [
        [name, stage["status"], f"{stage['seconds']:.0f}", f"{stage['limit_s']:.0f}", stage["reason"][-400:]]
        for name, stage in results["stages"].items()
    ]
    return "## Stages\n\n" + _table(("", "", "seconds", "limit", "reason"), rows)


def _correctness(results: Results) -> str:
    groups = of_stage(results, "correctness", "groups")
    if not groups:
        return ""
    rows = [
        [
            group["group"],
            str(group["cases"]),
            str(group["faults"]),
            (group["first_faults"] or [""])[0] or group["error"][-300:],
        ]
        for group in groups
    ]
    seed = results["stages"]["correctness"]["results"].get("seed")
    return f"## Correctness\n\nSeed {seed}.\n\n" + _table(("", "cases", "differ", "first fault"), rows)


def _sanitizer(results: Results) -> str:
    tools = of_stage(results, "sanitizer", "tools")
    if not tools:
        return ""
    rows = [
        [
            tool["name"],
            "-" if tool["reports"] is None else str(tool["reports"]),
            tool["status"],
            f"{tool['seconds']:.0f}",
        ]
        for tool in tools
    ]
    version = results["stages"]["sanitizer"]["results"].get("tool")
    return f"## compute-sanitizer\n\n{version}.\n\n" + _table(("", "reports", "ended", "seconds"), rows)


def _ceilings(results: Results) -> str:
    copies = of_stage(results, "ceilings", "copy")
    products = of_stage(results, "ceilings", "products")
    text = ""
    if copies:
        rows = [[f"{c['bytes'] >> 20} MiB", _us(c["us"]), f"{c['gbs']:.0f}"] for c in copies]
        text += "\nCopy on the device; GB/s count reads and writes:\n\n" + _table(("", "µs", "GB/s"), rows)
    if products:
        rows = [
            [p["name"], _shape(p), _us(p.get("us")), f"{p['tops']:.0f}" if "tops" in p else p["left_out"]]
            for p in products
        ]
        text += "\n" + _table(("", "M, N, K", "µs", "TOPS or TFLOPS"), rows)
    return "## Ceilings\n" + text if text else ""


def _large_products(results: Results) -> str:
    entries = of_stage(results, "kernels", "large_product")
    if not entries:
        return ""
    rows = [
        [
            _shape(entry),
            name if name != "dynquant" else f"dynquant ({entry['plan']}), with epilogue",
            _us(contender.get("us")),
            f"{contender['tops']:.0f}" if "tops" in contender else contender["left_out"],
        ]
        for entry in entries
        for name, contender in entry["contenders"].items()
    ]
    return "## Large products\n\n" + _table(("M, N, K", "", "µs", "TOPS"), rows)


def _rows(results: Results) -> str:
    entries = of_stage(results, "kernels", "rows")
    if not entries:
        return ""
    rows = [
        [
            entry["name"],
            f"{entry['M']}, {entry['K']}",
            entry.get("dtype", "-"),
            _us(entry.get("us")),
            _us(entry.get("copy_us")),
            f"{entry['gbs']:.0f}" if "gbs" in entry else entry["left_out"],
            f"{entry['of_copy']:.2f} x" if "of_copy" in entry else "-",
        ]
        for entry in entries
    ]
    note = "The copy reads and writes, together, as many bytes as the kernel does.\n\n"
    heads = ("", "M, K", "dtype", "µs", "copy µs", "GB/s", "time against the copy")
    return "## Ranges and quantization\n\n" + note + _table(heads, rows)


def _small_products(results: Results) -> str:
    entries = of_stage(results, "kernels", "small_product")
    if not entries:
        return ""
    rows = [
        [
            _shape(entry),
            entry["plan"],
            _us(entry["us"]),
            _us(entry["weight_read_us"]),
            f"{entry['of_limit']:.2f} x",
        ]
        for entry in entries
    ]
    heads = ("M, N, K", "kernel", "µs", "weight bytes / copy bandwidth, µs", "time against it")
    return "## Few rows\n\n" + _table(heads, rows)


def _layers(results: Results) -> str:
    entries = of_stage(results, "kernels", "layer")
    if not entries:
        return ""
    rows = []
    for entry in entries:
        us = {name: contender.get("us") for name, contender in entry["contenders"].items()}
        speeds = [speed(entry, name) for name in ("per_token", "per_tensor")]
        rows.append(
            [
                _shape(entry),
                *(_us(us.get(name)) for name in ("bf16 nn.Linear", "per_token", "per_tensor")),
                *("-" if value is None else f"{value:.2f} x" for value in speeds),
            ]
        )
    heads = (
        "M, N, K",
        "bf16 nn.Linear µs",
        "per_token µs",
        "per_tensor µs",
        "per_token speed",
        "per_tensor speed",
    )
    return "## Whole layers under CUDA graphs, bf16 in and out\n\n" + _table(heads, rows)


def _launches(results: Results) -> str:
    entries = of_stage(results, "kernels", "launches")
    if not entries:
        return ""
    rows = [
        [entry["activations"], str(entry["M"]), str(entry["count"]), ", ".join(entry["names"])]
        for entry in entries
    ]
    return "## Launches a forward\n\n" + _table(("", "M", "launches", ""), rows)


def _us(value: float | None) -> str:
    """Three or four figures, whatever the size."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _shape(entry: Results) -> str:
    return f"{entry['M']}, {entry['N']}, {entry['K']}"
