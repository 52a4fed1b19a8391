"""What the examples in docstrings and on these pages use without defining it: a small federated problem on digits."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_clip as fc

# 60 clients train on 27 digits each, on average; each digit's share differs from client to client.
digits = fc.data.partition.dirichlet(fc.data.sources.digits().examples, num_clients=66, alpha=1.0)
data, held_out_clients = digits.split_clients(0.1)
data, held_out = data.split_examples(0.1)


def per_example_loss(params, batch, key):
    """Softmax regression: the cross-entropy of each example, and whether it is classified well."""
    logits = batch["x"].reshape(-1, 64) @ params["w"] + params["b"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"accuracy": logits.argmax(-1) == batch["y"]}


params = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
client_tx = optax.chain(fc.clipping.clip_by_global_norm(1.0), optax.sgd(0.1))
algorithm = fc.fedavg(per_example_loss, client_tx)

key = jax.random.key(0)
server = algorithm.init(params)
uplink, reducer = fc.uplink.identity(), fc.reduce.weighted_mean()
cohorts = fc.extend.plan(data, np.array([3, 1, 4]), fc.extend.LocalWork(batch_size=20), seed=0, round=0)
cohort = jax.tree.map(lambda x: x[0], cohorts)  # of the first device
halves = fc.deploy.Halves(algorithm, fc.deploy.Population(data.num_clients, float(data.client_weights.sum())))
with contextlib.suppress(fc.InvalidInput):  # the examples of fc.deploy alone need flatbuffers: fedjax_clip[deploy]
    artefact = fc.deploy.exported(halves, params, data.examples, fc.extend.LocalWork(batch_size=20))
with contextlib.suppress(ImportError):  # the examples of chats need the packages of fedjax_clip[models]
    import tokenizers

    # A small decoder that knows a few words.
    words = ["<user>", "<assistant>", "<end>", "To", "be?", "Or", "not", "to", "be.", "Aye.", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    template += "{% if add_generation_prompt %}<assistant> {% endif %}"
    llama = fc.models.Llama(len(words), width=8, hidden=12, layers=1, heads=2, key_heads=1)
    decoder = fc.models.Pretrained(llama, llama.init(key, np.zeros((1, 4), np.int32)), tokenizer, template, end=2)
result = fc.train(algorithm, data, params, rounds=2, cohort_size=10)
