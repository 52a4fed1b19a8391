"""Labels of pictures and pages."""

import re

_WHO = {"step": "local step", "example": "example gradient", "client": "client update", "uplink": "client update"}
_WORDS = {
    "clipped_steps": "local steps clipped",
    "clipped_clients": "clients with a clipped step",
    "asked": "clients asked",
    "too_few": "rounds of too few clients",
    "update_norm": "norm of the server's update",
}


def label(metric: str) -> str:
    """A metric's name in words.

    Args:
      metric: as a row of ``fc.train``'s history has it.

    Example:
      >>> label("client_norm/p10"), label("uplink/1/threshold"), label("eval/examples/loss")
      ('client update norm, 10th percentile', 'client update threshold, link 2', 'loss, held-out examples')
    """
    if metric in _WORDS:
        return _WORDS[metric]
    if evaluated := re.fullmatch(r"eval/(\w+)/(.+)", metric):
        return f"{label(evaluated[2])}, held-out {evaluated[1]}"
    if (found := re.fullmatch(r"([a-z]+)(?:[_/](\d+))?[_/]([a-z_]+)(?:/(.+))?", metric)) and found[1] in _WHO:
        who, number, what, part = found.groups()
        words = f"{_WHO[who]}s clipped" if what == "clipped" else f"{_WHO[who]} {what.replace('_', ' ')}"
        words += f", {'link' if who == 'uplink' else 'clip'} {int(number) + 1}" if number else ""
        part = re.sub(r"^p(\d+)$", r"\1th percentile", part or "")
        return f"{words}, {part}" if part else words
    return metric.replace("_", " ").replace("/", ", ")


def drawable(text: str) -> str:
    """Text that matplotlib draws letter for letter: ``$`` begins no formula, and invalid UTF-8 does not fail."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
