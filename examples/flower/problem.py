"""The problem and its algorithms, which the server alone imports."""

import numpy as np
import optax

import fedjax_clip as fc


def loss(params, batch, key):
    """Softmax regression on handwritten digits."""
    logits = batch["x"].reshape(len(batch["x"]), -1) @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def params():
    """Where training begins."""
    return {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}


def examples():
    """Two rows that say what an example is."""
    return {"x": np.zeros((2, 8, 8, 1), np.float32), "y": np.zeros(2, np.int32)}


def algorithm(name):
    """One of the algorithms of ``NAMES``; cohorts have four clients."""
    sgd, links, mean = optax.sgd(0.1), fc.uplink, fc.reduce.exact_mean
    clip = links.clip_by_global_norm(0.5)
    if name == "fedavg":
        return fc.fedavg(loss, sgd, reducer=mean())
    if name == "scaffold":
        return fc.scaffold(loss, optax.chain(fc.clipping.clip_by_global_norm(1.0), sgd), reducer=mean(weighted=False))
    if name == "clip21":
        link = links.memory(fc.clipping.clip_by_global_norm(0.5))
        return fc.fedsgd(loss, optax.sgd(1.0), sgd, uplink=link, reducer=mean(weighted=False))
    if name == "quantile":  # a server that is trusted with one bit of each client
        return fc.fedavg(loss, sgd, uplink=links.quantile_clip(0.1), reducer=mean())
    if name == "local_noise":  # a server that is trusted with nothing
        return fc.fedavg(loss, sgd, uplink=links.chain(clip, links.local_gaussian(0.1)), reducer=mean(weighted=False))
    if name == "qsgd":
        code = links.compress(fc.compression.qsgd(4, bucket=64, coding="runs"))
        return fc.fedavg(loss, sgd, uplink=links.chain(clip, code), reducer=mean())
    from fedjax_clip import secure

    grid = links.chain(clip, links.integer_grid(16))
    return fc.fedavg(loss, sgd, uplink=grid, reducer=secure.pairwise_masks(4, 3))


NAMES = ("fedavg", "scaffold", "clip21", "quantile", "local_noise", "qsgd", "masks")
