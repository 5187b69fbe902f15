"""Numbers as a reader wants them: ages, durations, rates, times of day, bars."""

from __future__ import annotations

import time

FULL, EMPTY = "█", "░"
# A bar's last cell can be filled by eighths, so that 30 layers are visible in 10 cells.
EIGHTHS = " ▏▎▍▌▋▊▉"


def age(seconds: float | None) -> str:
    """`42s`, `3m10s`, `2h5m`, `4d`; `-` when not known."""
    if seconds is None or seconds < 0:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60}m"
    return f"{whole // 86400}d"


def duration(seconds: float | None) -> str:
    """`85 ms`, `1.25 s`, `12.3 s`, `2 min 5 s`; `-` when not known."""
    if seconds is None:
        return "-"
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 120:
        return f"{seconds:.2f} s" if abs(seconds) < 10 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def gigabytes_per_s(bytes_per_s: float) -> str:
    """`0.067 GB/s`, `12.3 GB/s`; `-` for none."""
    if bytes_per_s <= 0:
        return "-"
    return f"{bytes_per_s / 1e9:.3f} GB/s" if bytes_per_s < 1e9 else f"{bytes_per_s / 1e9:.1f} GB/s"


def clock(unix_s: float) -> str:
    """Local time of day, with tenths."""
    return time.strftime("%H:%M:%S", time.localtime(unix_s)) + f".{int(unix_s * 10) % 10}"


def bar(done: float, total: float, *, width: int) -> str:
    """A bar of `width` cells; full only when `done` reaches `total`."""
    share = min(1.0, max(0.0, done / total)) if total > 0 else 0.0
    eighths = int(share * width * 8)
    cells = FULL * (eighths // 8)
    if len(cells) < width and eighths % 8:
        cells += EIGHTHS[eighths % 8]
    return cells + EMPTY * (width - len(cells))


def count(number: int, noun: str) -> str:
    """`1 replica`, `2 replicas`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, two blanks apart, as kubectl prints them."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
