"""Links between a client and the server; ``chain`` joins them."""

from fedjax_clip.uplink import mechanism
from fedjax_clip.uplink.base import Context, Message, Packed, Uplink, at_client, stateless
from fedjax_clip.uplink.chains import chain, identity, on_parts
from fedjax_clip.uplink.clip import by_group, clip_by_global_norm, quantile_clip, zeroing
from fedjax_clip.uplink.compressed import compress, count_sketch, error_feedback, power_sgd
from fedjax_clip.uplink.extrapolate import fedexp
from fedjax_clip.uplink.grid import Grid, discrete_gaussian, integer_grid, skellam
from fedjax_clip.uplink.memories import memory, relative_to_last, with_bias
from fedjax_clip.uplink.noise import gaussian, local_gaussian
from fedjax_clip.uplink.promises import Noise, Promises, Wire
from fedjax_clip.uplink.scale import preconditioned

__all__ = [
    "Context",
    "Grid",
    "Message",
    "Noise",
    "Packed",
    "Promises",
    "Uplink",
    "Wire",
    "at_client",
    "by_group",
    "chain",
    "clip_by_global_norm",
    "compress",
    "count_sketch",
    "discrete_gaussian",
    "error_feedback",
    "fedexp",
    "gaussian",
    "identity",
    "integer_grid",
    "local_gaussian",
    "mechanism",
    "memory",
    "on_parts",
    "power_sgd",
    "preconditioned",
    "quantile_clip",
    "relative_to_last",
    "skellam",
    "stateless",
    "with_bias",
    "zeroing",
]
