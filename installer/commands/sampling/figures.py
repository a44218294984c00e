"""Writes numbers for people: short, with only the digits that matter."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def rate(value: float) -> str:
    """Events each second: "0", "0.4", "12.3", "1,204"."""
    if value == 0:
        return "0"
    if value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def count(value: float) -> str:
    """A whole number with commas between thousands: "1,204"."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes: "0 B", "812 B", "1.4 MiB"."""
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def span(seconds: float | None) -> str:
    """A time with its unit: "38 µs", "1.2 ms", "3.4 min"; "–" if there is none."""
    if seconds is None:
        return "–"
    for length, unit in _TIMES:
        # what would be rounded to 1,000 of a unit or more is left to the larger one
        if seconds >= length * 0.9995:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 9.95 and unit != "µs" else f"{value:.0f} {unit}"
    return "0 s" if seconds == 0 else "<1 µs"


def share(value: float | None) -> str:
    """A share from 0 to 1 as per cent; "–" if there is none. Only exact values are "0 %" or "100 %"."""
    if value is None:
        return "–"
    percent = value * 100
    if 0 < percent < 0.1:
        return "<0.1 %"
    if 99.9 < percent < 100:
        return ">99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) or percent >= 10 else f"{percent:.1f} %"
