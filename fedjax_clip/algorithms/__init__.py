"""Federated algorithms, readable beside their papers."""

from fedjax_clip.algorithms.broadcast import compressed_broadcast
from fedjax_clip.algorithms.corrected import feddyn, fednova, mime
from fedjax_clip.algorithms.episode import episode, episode_plus
from fedjax_clip.algorithms.fedavg import fedavg, fedsgd
from fedjax_clip.algorithms.fedbuff import fedbuff
from fedjax_clip.algorithms.frozen import partially_frozen
from fedjax_clip.algorithms.private import partially_private
from fedjax_clip.algorithms.scaffold import scaffold

__all__ = [
    "compressed_broadcast",
    "episode",
    "episode_plus",
    "fedavg",
    "fedbuff",
    "feddyn",
    "fednova",
    "fedsgd",
    "mime",
    "partially_frozen",
    "partially_private",
    "scaffold",
]
