"""``torch_loop`` on one thread: small operations are often faster so."""

from workers import torch_loop


class Peer(torch_loop.Peer):
    """As ``torch_loop``, but for the number of threads."""

    def __init__(self, task, devices):
        super().__init__(task, 1)
