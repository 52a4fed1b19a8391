"""The client: one exported program on data that stay here. It imports no algorithm, no model and no loss."""

import json
import pathlib

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def number(home: pathlib.Path) -> int:
    """Which client of the population this machine is."""
    return int(json.loads((home / "site.json").read_text())["number"])


def site(home: pathlib.Path):
    """The ``fc.deploy.Site`` whose data and artefact lie in this directory of its own machine."""
    import jax  # here, because Flower starts a process for each message, and ``who`` needs none of these
    import numpy as np

    from fedjax_clip import deploy

    jax.config.update("jax_compilation_cache_dir", str(home / "compiled"))  # for the next process
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with np.load(home / "data.npz") as arrays:
        examples = dict(arrays)
    member = None
    if (home / "signing.key").exists():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        identity = Ed25519PrivateKey.from_private_bytes((home / "signing.key").read_bytes())
        held = json.loads((home / "registry.json").read_text())
        registry = {int(c): bytes.fromhex(key) for c, key in held.items()}
        member = deploy.Member(number(home), home, identity, registry)
    return deploy.Site(deploy.Artefact.load(home / "client.zip"), number(home), examples, home, member=member)


@app.query()
def who(message: Message, context: Context) -> Message:
    """Which client of the population this node is."""
    return Message(RecordDict({"answer": ConfigRecord({"number": number(_home(context))})}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Any note of the server: a round, or a step of a secure sum."""
    note = dict(message.content.config_records["note"])
    return Message(RecordDict({"answer": ConfigRecord(site(_home(context)).answer(note))}), reply_to=message)


def _home(context: Context) -> pathlib.Path:
    return pathlib.Path(str(context.node_config["site"]))
