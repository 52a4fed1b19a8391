"""The client's half of a round as a file: one exported program, and the forms of what it reads and writes."""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from fedjax_clip.core import checks, files, keys
from fedjax_clip.core.types import InvalidInput, Params, PyTree
from fedjax_clip.data.planning import LocalWork
from fedjax_clip.deploy import wire
from fedjax_clip.deploy.halves import Halves, device_type
from fedjax_clip.deploy.wire import Form, Group
from fedjax_clip.uplink import Noise

PROGRAM, FORM, STATE = "program.bin", "form.json", "state.bin"


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms of what crosses the wire, and what a client needs to know besides the program.

    Attributes:
      examples: ``{field: (type, shape)}`` of one example.
      server: all leaves of the server's state; a client is sent those that its program reads, ``links``.
      links: places of these leaves.
      shared: what the server broadcasts.
      state: what a client keeps.
      message: its pieces.
      report: of the weight and of the client's metrics, all of which travel unless they are ``quiet``.
      told: places of the report's leaves that travel.
      quiet: whether noise or masks hide a client, so that it tells no metrics of its own.
      secret: whether a client draws from a secret of its own.
      masked: whether the message is masked, by ``fc.secure``.
      cohort_size, threshold: of a secure sum, else 0.
      batch_size, epochs, steps, shuffle, seed: of ``fc.train``.
      num_clients: N.

    Example:
      >>> artefact.forms.shared  # what clients of FedAvg are sent
      [('float32', (10,)), ('float32', (64, 10))]
    """

    examples: dict[str, Form]
    server: list[Form]
    links: list[int]
    shared: list[Form]
    state: list[Form]
    message: list[Group]
    report: list[Form]
    told: list[int]
    quiet: bool
    secret: bool
    masked: bool
    cohort_size: int
    threshold: int
    batch_size: int
    epochs: int
    steps: int | None
    shuffle: bool
    seed: int
    num_clients: int

    @property
    def sent_links(self) -> list[Form]:
        return [self.server[place] for place in self.links]

    @property
    def sent_report(self) -> list[Form]:
        return [self.report[place] for place in self.told]

    @property
    def work(self) -> LocalWork:
        return LocalWork(self.batch_size, self.epochs, self.steps, self.shuffle)


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A client's program with its forms; ``exported`` makes one, ``save`` and ``load`` are its file.

    Attributes:
      program: of ``jax.export``, serialised.
      forms: of what it reads and writes.
      state: what a client keeps before round 1, leaf by leaf.

    Example:
      >>> artefact.save("client.zip")
      >>> fc.deploy.Artefact.load("client.zip").sha256 == artefact.sha256
      True
    """

    program: bytes
    forms: Forms
    state: list[np.ndarray]

    @functools.cached_property
    def data(self) -> bytes:
        """The file's bytes, the same for the same program."""
        out = io.BytesIO()
        said = json.dumps(dataclasses.asdict(self.forms)).encode()
        with zipfile.ZipFile(out, "w") as file:
            for name, content in ((PROGRAM, self.program), (FORM, said), (STATE, wire.pack(self.state))):
                file.writestr(zipfile.ZipInfo(name), content)
        return out.getvalue()

    @functools.cached_property
    def sha256(self) -> str:
        """By which server and clients know that they have the same one."""
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def call(self) -> Callable[..., Any]:
        """The program, which is compiled when it is first called with a number of steps."""
        _check_flatbuffers()
        return jax.jit(jax_export.deserialize(bytearray(self.program)).call)

    def save(self, path: Any) -> None:
        """Writes the file, whole or not at all."""
        with files.replacing(files.expanded(path)) as file:
            file.write(self.data)

    @classmethod
    def load(cls, path: Any) -> "Artefact":
        """Reads the file.

        Raises:
          InvalidInput: no such file, or no such artefact.
        """
        path = files.expanded(path)
        try:
            with zipfile.ZipFile(path) as file:
                program, said, held = (file.read(name) for name in (PROGRAM, FORM, STATE))
            forms = Forms(**_restored(json.loads(said)))
            state = wire.unpack(held, forms.state, "A client's state")
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise InvalidInput(
                f"{path} is no client's artefact ({type(error).__name__}): write one by fc.deploy.exported(...).save."
            ) from None
        return cls(program, forms, state)


def exported(
    halves: Halves,
    params: Params,
    examples: PyTree,
    work: LocalWork,
    platforms: Sequence[str] = ("cpu",),
    own_secrets: bool | None = None,
) -> Artefact:
    """Exports the client's half: a program that needs neither the algorithm, nor the model, nor the loss.

    It serves every client and any number of steps. It is traced and exported once; each client's machine compiles it
    for its own number of steps.

    Args:
      halves: of the algorithm.
      params: initial parameters, of which only shapes and types matter.
      examples: pytree of arrays ``[n, ...]`` like a client's examples, such as two rows of zeros.
      work: the local work, with a batch size and steps that are numbers; ``work.largest_batch(data.sizes)`` is the
        batch size of a whole population.
      platforms: that the program is for: ``"cpu"``, ``"cuda"``, ``"tpu"``.
      own_secrets: whether each client draws its noise, and all else, from 256 bits of its own, which its ``Site``
        makes. By default it does if clients add noise, because the server could guess the noise of a public seed and
        take it out. ``False`` draws from the seed what ``fc.train`` draws from it: to compare the two.

    Returns:
      An ``Artefact``.

    Raises:
      InvalidInput: local work that is a function; an algorithm whose messages have other bytes than it reports.

    Example:
      >>> halves = fc.deploy.Halves(algorithm, fc.deploy.Population(54, 1617.0))
      >>> artefact = fc.deploy.exported(halves, params, data.examples, fc.extend.LocalWork(20))
      >>> artefact.save("client.zip")

    Source: ``jax.export``; the program is StableHLO, which later versions of JAX can read for six months.
    """
    _check_flatbuffers()
    checks.kind("work", work, LocalWork, "an fc.extend.LocalWork")
    if not isinstance(work.batch_size, int) or callable(work.steps):
        raise InvalidInput("An exported client has a batch size and local steps that are numbers, the same for all.")
    if own_secrets is None:
        own_secrets = halves.algorithm.parts.uplink.promises.noise in (Noise.CLIENT, Noise.SHARES)
    server = jax.eval_shape(halves.algorithm.init, params)
    shared = jax.eval_shape(halves.begin, server)
    state = halves.algorithm.init_client(params)
    leaves = {name: jax.tree.flatten(x) for name, x in (("server", server), ("shared", shared), ("state", state))}
    fields, structure = jax.tree.flatten_with_path(examples)
    (steps,) = jax_export.symbolic_shape("t", constraints=["t >= 2"])
    shapes: list[Any] = [
        [_aval(x) for x in leaves["server"][0]],
        [_aval(x) for x in leaves["shared"][0]],
        [jax.ShapeDtypeStruct((steps, work.batch_size, *x.shape[1:]), device_type(x)) for _, x in fields],
        jax.ShapeDtypeStruct((steps, work.batch_size), jnp.float32),
        [_aval(x) for x in leaves["state"][0]],
        tuple(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32)),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        jax.ShapeDtypeStruct((keys.WORDS if own_secrets else 0,), jnp.uint32),
    ]
    made: dict[str, Any] = {}

    def traced(server, shared, batches, example_weight, state, client, key, secret):
        back = {name: jax.tree.unflatten(leaves[name][1], x) for name, x in (("server", server), ("shared", shared))}
        kept = jax.tree.unflatten(leaves["state"][1], state)
        batches = jax.tree.unflatten(structure, batches)
        own = secret if own_secrets else None
        sent, kept = halves.work(back["server"], back["shared"], batches, example_weight, kept, client, key, own)
        made["sent"] = jax.eval_shape(lambda x: x, sent)
        report = [sent.weight, *jax.tree.leaves(sent.report)]
        return jax.tree.leaves(sent.message), report, jax.tree.leaves(kept)

    program = jax.jit(traced)
    read = _read_by(program.trace(*shapes).jaxpr.jaxpr)
    done = jax_export.export(program, platforms=list(platforms))(*shapes)
    sent = made["sent"]
    halves.check_bytes(sent)
    if own_secrets and halves.opened is not None:
        raise InvalidInput(
            "The server opens a code with the client's key, and does not have the key of a client's own secret: take "
            "the compressor out, or draw from the seed by own_secrets=False."
        )
    reducer = halves.algorithm.parts.reducer
    masked, quiet = bool(reducer.hides), halves.quiet
    forms = Forms(
        examples={jax.tree_util.keystr(path): wire.form(x[0]) for path, x in fields},
        server=[wire.form(x) for x in leaves["server"][0]],
        links=[place for place in range(len(leaves["server"][0])) if place in read],
        shared=[wire.form(x) for x in leaves["shared"][0]],
        state=[wire.form(x) for x in leaves["state"][0]],
        message=wire.groups(sent.message),
        report=[wire.form(x) for x in [sent.weight, *jax.tree.leaves(sent.report)]],
        told=halves.told(sent),
        quiet=quiet,
        secret=own_secrets,
        masked=masked,
        cohort_size=int(reducer.denominator or 0) if masked else 0,
        threshold=int(reducer.threshold or 0) if masked else 0,
        batch_size=work.batch_size,
        epochs=work.epochs,
        steps=work.steps,
        shuffle=work.shuffle,
        seed=halves.seed,
        num_clients=halves.population.num_clients,
    )
    return Artefact(bytes(done.serialize()), forms, [np.asarray(x) for x in leaves["state"][0]])


def _check_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise InvalidInput("An exported program needs flatbuffers: pip install 'fedjax_clip[deploy]'.")


def _read_by(program: Any) -> set[int]:
    """The places of the arguments that a traced program reads."""
    variables = {id(x) for equation in program.eqns for x in equation.invars} | {id(x) for x in program.outvars}
    return {place for place, x in enumerate(program.invars) if id(x) in variables}


def _aval(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _restored(said: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the forms and groups that they were."""

    def forms(values: list[Any]) -> list[Form]:
        return [(name, tuple(shape)) for name, shape in values]

    return said | {
        **{name: forms(said[name]) for name in ("server", "shared", "state", "report")},
        "examples": {field: (name, tuple(shape)) for field, (name, shape) in said["examples"].items()},
        "message": [Group(forms(arrays), codes) for arrays, codes in said["message"]],
    }
