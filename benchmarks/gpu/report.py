"""The numbers of a run on GPUs as tables."""

from typing import Any

GIB = 2**30


def as_markdown(found: dict[str, Any]) -> str:
    """The numbers as tables."""
    known, sizes = ", ".join(f"{n} {v}" for n, v in found["versions"].items() if v), found["sizes"]
    parameters = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    lines = [
        "# Steps on GPUs",
        "",
        f"`python -m benchmarks.gpu`: {found['ranks']} ranks by {found['backend']} on {found['cards'] or 'no'} x "
        f"{found['card']}; {known}. Parameters: {parameters}; {sizes['dtype']}; microbatches of {sizes['tokens']} "
        f"tokens, {sizes['images']} images of {sizes['pixels']} x {sizes['pixels']}.",
        "",
        f"Seconds of a step of {sizes['microbatches']} microbatches, without its optimizer:",
        "",
        "| | measured | as planned from measured actions | measured / planned | ranks compute |",
        "|---|---|---|---|---|",
    ]
    for row in found["steps"]:
        planned = row["planned"]
        said = ("", "") if planned is None else (f"{planned:.3f}", f"{row['seconds'] / planned:.3f}")
        busy = f"{min(row['busy']):.0%} to {max(row['busy']):.0%}"
        lines.append(f"| {row['policy']} | {row['seconds']:.3f} | {said[0]} | {said[1]} | {busy} |")
    what = "activations" if found["card"] == "CPU" else "the allocator, without the batch"
    lines += ["", f"Peak GiB of the fullest rank ({what}), and what `bigmac plan --config` estimates for it:", ""]
    lines += ["| | microbatches | peak | estimate |", "|---|---|---|---|"]
    for row in found["memory"]:
        peak, estimate = row["peak"] / GIB, row["estimate"] / GIB
        lines.append(f"| {row['policy']} | {row['microbatches']} | {peak:.4g} | {estimate:.4g} |")
    if seconds := found["overlap"]:
        lines += [
            "",
            f"Eight messages of a stage's size take {seconds['messages'] * 1e3:.2f} ms, matrix products "
            f"{seconds['products'] * 1e3:.2f} ms, and both together {seconds['together'] * 1e3:.2f} ms: "
            f"{seconds['hidden']:.0%} of the shorter one is hidden.",
        ]
    return "\n".join(lines) + "\n"
