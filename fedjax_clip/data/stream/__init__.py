"""Streams: examples and clients that come, go and change by rounds, for incremental (continual) learning.

Each example has a life: a first round, and a round in which it is gone (``FederatedData.lives``). Every rule here takes
a population and returns one with other lives. In a round, a client has the examples that live; it may be drawn if it
has any. So a stream is data: the cohorts and batches of a round stay a function of (seed, round), all examples lie on
the devices from the start, and one program trains all rounds.
"""

from fedjax_clip.data.lives import ENDLESS
from fedjax_clip.data.stream.replay import balanced, reservoir
from fedjax_clip.data.stream.rules import between, classes, clients, drift, in_order, phases
from fedjax_clip.data.stream.scores import accuracies, average_accuracy, backward_transfer, forgetting

__all__ = [
    "ENDLESS",
    "accuracies",
    "average_accuracy",
    "backward_transfer",
    "balanced",
    "between",
    "classes",
    "clients",
    "drift",
    "forgetting",
    "in_order",
    "phases",
    "reservoir",
]
