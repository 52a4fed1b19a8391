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
    """A seed of 32 bytes, for ``data/draws.py``; it shows nothing of itself."""

    def __repr__(self) -> str:
        return "<a secret seed>"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(NOT_COPIED)


class Secret:
    """256 secret bits from which a run draws its noise and its cohorts, in place of the public seed.

    With the seed that a run is described by, anybody computes its noise and subtracts it: a seed of 32 bits is found
    even if it is not told. Numbers drawn from a secret are those of ChaCha20 (noise) and SHAKE-256 (cohorts), so
    neither the model nor all other numbers that a run publishes say anything of them. ``repr`` shows nothing, and
    ``pickle`` and ``copy`` are refused. The bytes are in the memory of the process, where a debugger finds them.

    A secret is for ONE run, and ``fc.train`` refuses one that has begun another in this process. It draws from
    ``of(data)``, so a run that begins again on other data has other noise. Two runs of one secret on the same data,
    with another clip say, would have the same noise: what they publish differs by what it hid.

    Args:
      content: 32 bytes, as ``os.urandom`` makes them: take ``Secret.fresh()`` or ``Secret.kept(path)``.
      known: whether somebody knows them.

    Attributes:
      known: whether somebody knows them: then nothing that is drawn from it is private.

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
        """A new one of ``os.urandom``."""
        return cls(os.urandom(SIZE))

    @classmethod
    def of_seed(cls, seed: int) -> "Secret":
        """The same for the same seed, for tests and to repeat a run. Not private: its noise can be computed.

        Args:
          seed: from 0 to 2^32 - 1.
        """
        number = checks.seed("Secret.of_seed: seed", seed)
        return cls(hashlib.blake2b(b"%d" % number, digest_size=SIZE, person=b"known").digest(), known=True)

    @classmethod
    def kept(cls, path: files.PathLike) -> "Secret":
        """What the file holds, or a new one in a new file that only its owner may read.

        The file appears whole, or not at all. One process at a time may ask for a file that there is not.

        Args:
          path: of the file. Remove it when the run is complete: who has it and what the run published has the data.

        Raises:
          InvalidInput: a file of another size, that others may read, or that is a link; a path that cannot be written.
        """
        file = files.expanded(path)
        beside = file.with_name(file.name + ".new")  # left by a process that was killed, which drew nothing from it
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
        """What a run on these data draws from: on others, what was drawn says nothing of it.

        Args:
          fingerprint: a hash of the data.
        """
        return Secret(self._derived("data", of=fingerprint.encode()), self.known)

    def begin(self) -> None:
        """Says that a run begins with it.

        Raises:
          InvalidInput: it has begun one before, unless it is known and hides nothing anyway.
        """
        if self._begun and not self.known:
            raise InvalidInput(
                "This secret has begun a run before, whose noise another one would repeat: take another, as "
                "fc.privacy.Secret.fresh() makes them, or resume that run from its checkpoints."
            )
        self._begun = True

    @property
    def commitment(self) -> str:
        """A hash by which a run knows it again, in 32 hexadecimal digits. To find a secret by it takes 2^256 trials."""
        return self._derived("commitment", 16).hex()

    def key(self) -> Array:
        """The ChaCha20 key of all noise, for ``jax.random``."""
        return keys.chacha(self.words())

    def words(self) -> np.ndarray:
        """The words of ``key``, uint32 ``[8]``."""
        return np.frombuffer(self._derived("noise"), "<u4").astype(np.uint32)

    def seed(self) -> SecretSeed:
        """What samplers draw cohorts from."""
        return SecretSeed(self._derived("cohorts"))

    def _derived(self, purpose: str, size: int = SIZE, of: bytes = b"") -> bytes:
        """Keyed BLAKE2b: what is known of one purpose says nothing of another's."""
        return hashlib.blake2b(of, key=self._content, person=purpose.encode(), digest_size=size).digest()

    def __repr__(self) -> str:
        return f"<a secret{' that is known' * self.known}>"

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(NOT_COPIED)


def remove(path: files.PathLike) -> None:
    """Removes a file of ``Secret.kept``; when it returns, the removal is on disk."""
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
