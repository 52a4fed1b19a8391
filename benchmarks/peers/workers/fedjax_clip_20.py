"""fedjax_clip with up to 20 rounds a dispatch (never more than the cohorts' period)."""

from workers import fedjax_clip


class Peer(fedjax_clip.Peer):
    """As ``fedjax_clip``, but for the length of a dispatch."""

    def __init__(self, task, devices):
        super().__init__(task, devices, rounds_per_dispatch=min(20, len(task.cohorts)))
