"""Secret randomness for noise and cohorts: 256 bits of the operating system."""

import contextlib
import hashlib
import os
import stat
from typing import NoReturn

import numpy as np

from fedjax_clip.core import checks, files, keys
from fedjax_clip.core.types import Array, InvalidInput

SIZE = 32  # bytes
NOT_COPIED = "A secret is not pickled or copied, or it would lie wherever the copy goes."


class SecretSeed(bytes):
    """A seed of 32 bytes, for ``data/draws.py``; its ``repr`` reveals nothing."""

    def __repr__(self) -> str:
        return "<a secret seed>"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(NOT_COPIED)


class Secret:
    """256 secret bits from which a run draws its noise and its cohorts, in place of the public seed.

    Anybody who knows a run's seed can compute its noise and subtract it, and 32 bits can be found by trial. A secret's
    numbers come from ChaCha20 (noise) and SHAKE-256 (cohorts), so the model and all other published numbers reveal
    nothing about them. ``repr`` shows nothing, and ``pickle`` and ``copy`` are refused. The bytes are in the memory of
    the process, where a debugger finds them.

    A secret is for ONE run: ``fc.train`` refuses a secret that has begun another run in this process. It draws from
    ``of(data)``, so a run on other data has other noise. Two runs with one secret on the same data, for example with
    different clips, would have the same noise, and their difference would reveal what the noise hid.

    Args:
      content: 32 bytes, as ``os.urandom`` makes them: take ``Secret.fresh()`` or ``Secret.kept(path)``.
      known: whether somebody knows them.

    Attributes:
      known: whether somebody knows them; then nothing drawn from the secret is private.

    Raises:
      InvalidInput: not 32 bytes.

    Example:
      >>> sampler, secret = fc.data.sampling.poisson(50), fc.privacy.Secret.fresh()
      >>> result = fc.train(algorithm, data, params, rounds=10, sampler=sampler, secret=secret)
    """

    __slots__ = ("_begun", "_content", "known")

    def __init__(self, content: bytes, known: bool = False):
        if not isinstance(content, bytes) or len(content) != SIZE:
            raise InvalidInput(f"A secret is {SIZE} bytes, such as os.urandom({SIZE}) makes.")
        self._content, self.known, self._begun = content, known, False

    @classmethod
    def fresh(cls) -> "Secret":
        """A new secret from ``os.urandom``."""
        return cls(os.urandom(SIZE))

    @classmethod
    def of_seed(cls, seed: int) -> "Secret":
        """The secret of a seed, for tests and to repeat a run. Not private, because anybody can compute its noise.

        Args:
          seed: from 0 to 2^32 - 1.
        """
        number = checks.seed("Secret.of_seed: seed", seed)
        return cls(hashlib.blake2b(b"%d" % number, digest_size=SIZE, person=b"known").digest(), known=True)

    @classmethod
    def kept(cls, path: files.PathLike) -> "Secret":
        """The secret in a file, or a new secret in a new file that only its owner may read.

        The file appears whole, or not at all. Only one process at a time may create it.

        Args:
          path: of the file. Remove it when the run is complete: together with the published results it reveals the
            data.

        Raises:
          InvalidInput: a file of another size, a file that others may read, a link; a path that cannot be written.
        """
        file = files.expanded(path)
        beside = file.with_name(file.name + ".new")  # left by a killed process, which drew nothing from it
        try:
            beside.unlink(missing_ok=True)
            if not os.path.lexists(file):
                _write(beside, os.urandom(SIZE))
                os.rename(beside, file)
                files.sync(file.parent)
            return cls(_read(file))
        except OSError as error:
            raise InvalidInput(f"The secret key {file} cannot be read or made: {error.strerror}.") from None

    def of(self, fingerprint: str) -> "Secret":
        """The secret of a run on these data, independent of the secrets on other data.

        Args:
          fingerprint: a hash of the data.
        """
        return Secret(self._derived("data", of=fingerprint.encode()), self.known)

    def begin(self) -> None:
        """Marks the begin of a run with this secret.

        Raises:
          InvalidInput: the secret has begun a run before, unless it is known and hides nothing anyway.
        """
        if self._begun and not self.known:
            raise InvalidInput(
                "This secret has begun a run before, whose noise another one would repeat: take another, as "
                "fc.privacy.Secret.fresh() makes them, or resume that run from its checkpoints."
            )
        self._begun = True

    @property
    def commitment(self) -> str:
        """A hash that identifies the secret, 32 hexadecimal digits. Inverting it takes 2^256 trials."""
        return self._derived("commitment", 16).hex()

    def key(self) -> Array:
        """The ChaCha20 key of all noise, for ``jax.random``."""
        return keys.chacha(self.words())

    def words(self) -> np.ndarray:
        """The words of ``key``, uint32 ``[8]``."""
        return np.frombuffer(self._derived("noise"), "<u4").astype(np.uint32)

    def seed(self) -> SecretSeed:
        """The seed of cohorts, for samplers."""
        return SecretSeed(self._derived("cohorts"))

    def _derived(self, purpose: str, size: int = SIZE, of: bytes = b"") -> bytes:
        """Keyed BLAKE2b: the key of one purpose reveals nothing about another's."""
        return hashlib.blake2b(of, key=self._content, person=purpose.encode(), digest_size=size).digest()

    def __repr__(self) -> str:
        return f"<a secret{' that is known' * self.known}>"

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(NOT_COPIED)


def remove(path: files.PathLike) -> None:
    """Removes a file of ``Secret.kept``, and returns once the removal is on disk."""
    file = files.expanded(path)
    for name in (file.with_name(file.name + ".new"), file):
        name.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        files.sync(file.parent)


def _write(path: os.PathLike[str], content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: os.PathLike[str]) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size != SIZE:
            raise InvalidInput(f"The secret key {path} is no file of {SIZE} bytes, so no secret of a run: put it back.")
        if stat.S_IMODE(about.st_mode) & 0o077 or about.st_uid != os.geteuid():
            raise InvalidInput(
                f"The secret key {path} can be read by others (mode {stat.S_IMODE(about.st_mode):o}), so it is no "
                "secret: begin a run of another directory, on a disk that keeps permissions."
            )
        return file.read()
