"""Links that an update passes on its way to the server; each is one value, and so is a chain of them."""

from fedjax_clip.uplink.base import Context, Uplink, at_client, chain, identity
from fedjax_clip.uplink.clip import clip_by_global_norm

__all__ = ["Context", "Uplink", "at_client", "chain", "clip_by_global_norm", "identity"]
