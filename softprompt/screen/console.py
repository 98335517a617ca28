"""The one console, one for standard error, and sizes for people."""

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)
beside = Console(highlight=False, soft_wrap=True, stderr=True)  # for what is no result


def size(num_bytes: float) -> str:
    """Bytes for people: 1.3 GB, 131 kB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
