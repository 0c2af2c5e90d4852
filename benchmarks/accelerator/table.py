"""Tables of the results of a run, complete or interrupted."""

from collections.abc import Sequence


def format_tables(rows: Sequence[dict]) -> str:
    """Returns the facts, tables of kernels, layers and steps, and the phases that did not run."""
    sections = [
        _format_facts(rows),
        _format_kernels(rows),
        _format_layers(rows),
        _format_steps(rows),
        _format_ragged_dot(rows),
        _format_profiles(rows),
        _format_endings(rows),
    ]
    return "\n\n".join(section for section in sections if section)


def _format_facts(rows: Sequence[dict]) -> str:
    facts = _find(rows, "facts")
    if not facts:
        return "Nothing is known about the machine: the first phase has no result."
    row = facts[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    revision = row["revision"] or "no git revision"
    changed = " with modified files" if row["modified_files"] else ""
    memory = f", {row['memory_gib']} GiB" if row["memory_gib"] else ""
    lines = [
        f"{row['devices']} x {row['device_kind']} ({row['chip']}){memory}; {versions}; "
        f"{revision}{changed}, source {row['source_digest']}"
    ]
    lines += [f"{backend} does not run here: {why}" for backend, why in row["refused"].items()]
    return "\n".join(lines)


def _format_kernels(rows: Sequence[dict]) -> str:
    table = [("kernels", "case", "correct", "same bits twice", "largest error / norm")]
    faults = []
    for row in _find(rows, "kernels"):
        errors = row.get("errors", {}).values()
        largest = "not finite" if None in errors else max(errors, default=None)
        table.append((row["backend"], row["case"], row["correct"], row.get("same_bits"), largest))
        if isinstance(row.get("wrong"), str):
            faults.append(row["wrong"])
            continue
        for fault in row.get("wrong", []):
            faults.append(
                f"{row['backend']}, {row['case']}: {fault['array']} of expert {fault['expert']} is "
                f"wrong in rows {fault['rows']}, columns {fault['columns']} (error / norm "
                f"{fault['error_over_norm']}, not finite {fault['not_finite']})"
            )
    return "\n".join([_format(table), *faults])


def _format_layers(rows: Sequence[dict]) -> str:
    """Returns the table of layers.

    The ratio to equal widths is the time per FLOP of MoDSE over that of equal widths.
    """
    measured = {
        (row["name"], row["backend"], row["case"], row["what"]): row
        for row in _find(rows, "layer")
        if "teraflops_per_second" in row
    }
    table = [("layer", "case", "pass", "ms", "TFLOP/s", "of dense", "time / equal widths", "GiB")]
    for (name, backend, case, what), row in measured.items():
        rate = row["teraflops_per_second"]
        dense = measured.get((name, "dense", "SwiGLU", what))
        equal = measured.get((name, backend, "equal", what)) if case == "modse" else None
        table.append(
            (
                name if backend != "dense" else f"{name}: dense",
                case,
                what,
                row["milliseconds"],
                rate,
                dense and _divide(rate, dense["teraflops_per_second"]),
                equal and _divide(equal["teraflops_per_second"], rate),
                row["compiled_peak_gib"],
            )
        )
    errors = [
        f"{row['name']}, {row.get('case', '')} {row.get('what', '')}: {row['error']}"
        for row in _find(rows, "layer")
        if "error" in row
    ]
    return "\n".join([_format(table), *errors])


def _format_steps(rows: Sequence[dict]) -> str:
    steps = [row for row in _find(rows, "step") if "tokens_per_second" in row]
    header = ("tokens/s", "of best", "ms", "MFU", "MFU of widths met", "peak GiB", "compile s")
    table = [("step", *header, "first loss", "last loss")]
    best = max((row["tokens_per_second"] for row in steps), default=0)
    for row in steps:
        table.append(
            (
                row["name"].removeprefix("step "),
                row["tokens_per_second"],
                _divide(row["tokens_per_second"], best),
                round(1e3 * row["step_seconds"], 2),
                _percent(row["mfu_nominal"]),
                _percent(row["mfu_realised"]),
                row["peak_gib"],
                row["compile_seconds"],
                row["losses"][0],
                row["losses"][-1] if row["finite"] else "not finite",
            )
        )
    return _format(table)


def _format_ragged_dot(rows: Sequence[dict]) -> str:
    table = [("lax.ragged_dot", "ms", "TFLOP/s", "by cuDNN")]
    for row in _find(rows, "ragged_dot"):
        if "error" in row:
            table.append((row["what"], row["error"][:80], None, row.get("by_cudnn")))
        else:
            table.append(
                (row["what"], row["milliseconds"], row["teraflops_per_second"], row["by_cudnn"])
            )
    return _format(table)


def _format_profiles(rows: Sequence[dict], most: int = 6) -> str:
    table = [("longest kernels of", "calls", "ms", "share", "kernel")]
    for row in rows:
        for kernel in row.get("kernels", [])[:most]:
            share = _divide(kernel["milliseconds"], row["busy_milliseconds"])
            table.append(
                (
                    row["name"],
                    kernel["calls"],
                    kernel["milliseconds"],
                    _percent(share),
                    kernel["name"][:60],
                )
            )
    return _format(table)


def _format_endings(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        if row["phase"] == "skipped":
            lines.append(
                f"skipped: {row['name']} ({row['seconds_left']} s were left, it takes about "
                f"{row['seconds_expected']} s)"
            )
        elif row["phase"] in ("failed", "stopped"):
            last = (row["error"].splitlines() or [""])[-1]
            lines.append(f"{row['phase']}: {row['name']} after {row['seconds']} s: {last[:300]}")
        elif row["phase"] == "interrupted":
            lines.append("The run was interrupted here.")
    return "\n".join(lines)


def _find(rows: Sequence[dict], phase: str) -> list[dict]:
    return [row for row in rows if row["phase"] == phase]


def _divide(a: float, b: float) -> float | None:
    return round(a / b, 3) if b else None


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"


def _format(table: Sequence[tuple]) -> str:
    """Returns aligned columns, or "" if there is nothing below the header."""
    if len(table) == 1:
        return ""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in table]
    sizes = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes)).rstrip() for row in cells
    )
