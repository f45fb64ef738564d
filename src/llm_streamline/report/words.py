"""Numbers as people read them: one place decides units, digits and signs, so that table, page and card agree."""

from collections.abc import Sequence

MISSING = "–"
NBSP = "\u00a0"  # keeps a number and its unit on one line; `plain` takes it out again for terminals
# What the sources that packages carry stand for: Hub id of the model, and its licence as the Hub spells it.
CARRIED_BASES = {
    "demo": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "gemma": ("google/gemma-3-270m", "gemma"),
}


def count(number: float) -> str:
    """A large count in decimal units: 134515008 -> '134.5 M'. Below ten thousand it stands as it is."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= size:
            return f"{_digits(number / size)}{NBSP}{unit}"
    return f"{_digits(number / 1e3)}{NBSP}k" if abs(number) >= 1e4 else f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 23040 -> '23.0 kB'."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= scale:
            return f"{_digits(num_bytes / scale)}{NBSP}{unit}"
    return f"{num_bytes:.0f}{NBSP}B"


def _digits(value: float) -> str:
    # three to four leading digits: 8.03, 134.5, 1,204
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: 0.004 -> '4.0 ms', 75 -> '1 min 15 s'."""
    if seconds < 1:
        return f"{1000 * seconds:.1f}{NBSP}ms"
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours else f"{minutes}{NBSP}min {rest}{NBSP}s"


def decimal(value: float, digits: int = 2) -> str:
    """A plain number; very large and very small ones as powers of ten, negative ones with a true minus sign."""
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 10**-digits / 2):
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] as per cent: 0.2371 -> '23.7 %'."""
    return f"{100 * share:.{digits}f}{NBSP}%".replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, true minus; no sign where it rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def chance_of(p: float) -> str:
    """A p-value: '0.031', '< 0.001'."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def signed_percent(share: float, digits: int = 1) -> str:
    """A change relative to the original: -0.237 -> '−23.7 %'."""
    return f"{signed(100 * share, digits)}{NBSP}%"


def points(difference: float, digits: int = 1) -> str:
    """A difference of two shares in percentage points: -0.031 -> '−3.1 pts'."""
    return f"{signed(100 * difference, digits)}{NBSP}pts"


def times(ratio: float) -> str:
    """A ratio: 2.54 -> '2.54 ×'."""
    return f"{decimal(ratio)}{NBSP}×"


def plain(text: str) -> str:
    """The same text with ordinary spaces, for terminals and plain files."""
    return text.replace(NBSP, " ")


def rate(per_second: float) -> str:
    """Tokens per second: '21.3', '1,080', '12.5 k'."""
    return f"{per_second:.1f}" if per_second < 100 else count(per_second)


def between(low: str, high: str) -> str:
    """An interval of two values already in words."""
    return f"[{low}, {high}]"


def layers(start: int, stop: int) -> str:
    """The half-open span [start, stop) as people name it: 'layers 12–21', 'layer 12'."""
    return f"layer {start}" if stop - start == 1 else f"layers {start}–{stop - 1}"


def sublayer(part: str) -> str:
    """'attention', 'MLP'."""
    return part.upper() if part == "mlp" else part


def plural(number: int, noun: str) -> str:
    """'1 layer', '9 layers'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def model_name(spec: str) -> str:
    """A short name for a model source: the last part of a path, a Hub id as it stands, a carried model's real name."""
    if spec in CARRIED_BASES:
        return CARRIED_BASES[spec][0].rpartition("/")[2]
    name = spec.rstrip("/\\")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf"):
        return name
    return name.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gguf") or spec
