"""What `quantkit bench MODEL` prints: each model, its cells, and how many times faster the first one is."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from quantkit.cli.output import Screen, size

_CELL = ("batch", "context")


def print_models(report: dict[str, Any], console: Screen) -> None:
    """The whole report (`quantkit-bench/1`)."""
    roofline, machine = report["roofline"], report["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    console.print(f"{where}: reads {roofline['read_bytes_per_s'] / 1e9:.1f} GB/s ({roofline['source']})")
    for model in report["models"]:
        console.print()
        print_model(model, report["settings"], console)
    for row in report["against"]:
        console.print()
        behind = f" behind {row['context']}" if row["context"] else ""
        ratios = ", ".join(f"{kind} {noisy(row[kind], 2)}x" for kind in ("prefill", "decode"))
        console.print(f"{row['model']} / {row['other']}, batch {row['batch']}{behind}: {ratios}")
    rounds = report["settings"]["rounds"]
    console.print()
    console.print(f"medians over {rounds} rounds; \u00b1 is the median absolute deviation of a round")


def print_model(model: dict[str, Any], settings: dict[str, Any], console: Screen) -> None:
    """One model: what it is and where it runs, then a row per cell."""
    reason = f" ({model['reason']})" if model["reason"] else ""
    told = [model["dtype"], f"compute {model['compute']}", f"KV cache {model['kv_cache']}"]
    console.print(f"{model['name']}: {model['way']}{reason} on {model['device']}, {', '.join(told)}")
    for line in kind_lines(model["kinds"]):
        console.print(f"  {line}")
    memory = model["memory"]
    if memory:
        console.print(f"  peak {size(memory['peak_bytes'])}: {memory['what']}")
    table = Table(
        *_CELL,
        f"prompt of {settings['prompt']}, tokens/s",
        "first token, s",
        f"decode of {settings['new']}, tokens/s",
        "step, ms: median, p95",
        "GB/s",
        "of the roofline",
        "where a step's time goes",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in table.columns[:-1]:
        column.justify = "right"
    for row in model["rows"]:
        prefill, decode = row["prefill"], row["decode"]
        step = decode["step_s"]
        table.add_row(
            str(row["batch"]),
            str(row["context"]),
            noisy(prefill["tokens_per_s"], 1),
            f"{prefill['first_token_s']['median']:.3f}",
            noisy(decode["tokens_per_s"], 1),
            f"{1e3 * step['median']:.2f}, {1e3 * step['p95']:.2f}",
            f"{decode['bytes_per_s'] / 1e9:.1f}",
            f"{prefill['roofline_share']:.0%} ({prefill['bound']}), {decode['roofline_share']:.0%} ({decode['bound']})",
            shares(decode["parts_s"]),
        )
    console.print(table)


def kind_lines(kinds: list[dict[str, Any]]) -> list[str]:
    """A line per backend and scheme: "native avx2, W4A16 g128: 154 linears (q_proj, ...), 553.6 MB"."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in kinds:
        groups.setdefault((one["backend"], one["scheme"] or "not quantized"), []).append(one)
    lines = []
    for (backend, scheme), group in groups.items():
        names = ", ".join(dict.fromkeys(one["kind"].rpartition(".")[2] for one in group))
        count, total = (sum(one[key] for one in group) for key in ("count", "bytes"))
        lines.append(f"{backend}, {scheme}: {count} weights ({names}), {size(total)}")
    return lines


def noisy(values: dict[str, Any], digits: int) -> str:
    """A median and its noise."""
    return f"{values['median']:.{digits}f} \u00b1 {values['mad']:.{digits}f}"


def shares(parts: dict[str, float] | None) -> str:
    """ "linears 81 %, head 12 %": the parts that take a percent or more."""
    if not parts:
        return "-"
    whole = sum(parts.values()) or 1.0
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items() if value >= 0.005 * whole)
