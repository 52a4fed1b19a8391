"""Real clients: a round cut at the wire, exported for processes that see only their own data.

``docs/real-clients.md`` says how Flower runs it, and what is trusted to whom.
"""

import importlib
from typing import Any

from fedjax_clip.deploy.artefact import Artefact, Forms, exported
from fedjax_clip.deploy.client import Note, Site
from fedjax_clip.deploy.halves import Halves, Population
from fedjax_clip.deploy.server import Rounds, Traffic

__all__ = ["Artefact", "Forms", "Halves", "Member", "Note", "Population", "Rounds", "Site", "Traffic", "exported"]


def __getattr__(name: str) -> Any:
    if name == "Member":  # cryptography, which other clients do not need
        return importlib.import_module("fedjax_clip.deploy.masks").Member
    raise AttributeError(f"module 'fedjax_clip.deploy' has no attribute {name!r}")
