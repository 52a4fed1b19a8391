"""Private runs as their user and their enemy meet them: what a run directory tells, what is removed, and when."""

import base64
import functools
import json
import os
import pathlib
import random
import re
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import fedjax_clip as fc
from experiments import run
from experiments.config import privacy, registry, rundir, spec
from experiments.page import results
from fedjax_clip.core import files, keys, secret, tree
from fedjax_clip.privacy import Secret
from fedjax_clip.training import identity

DIM = 40

PRIVATE = (
    *("--task=linear_regression(num_clients=6)", "--cohort_size=3", "--sampler=poisson", "--delta=0.01"),
    "--uplink=quantile_clip(0.5, bits_noise=2.0)|gaussian(2.0)",
)


@pytest.fixture
def cli(binaries):
    return functools.partial(binaries, "run")


def forms(hidden):
    """Every way in which 32 bytes may stand in a file: whole, or any eight of them in a row by themselves."""
    for big in (False, True):
        numbers = np.frombuffer(hidden, ">u4" if big else "<u4")
        swapped = numbers.astype("<u4").tobytes()
        for size in (8, 32):
            part = swapped[:size]
            yield from (part, part.hex().encode(), part.hex().upper().encode(), part[::-1])
            yield base64.b64encode(part).rstrip(b"=")[:-1]
        for joined in (b",", b", ", b" ", b"\n", b" \n", b",\n      "):
            yield joined.join(b"%d" % n for n in numbers[:2])
        yield b"%d" % int.from_bytes(swapped, "little")


def everything(directory):
    """What every file of a run directory holds, but for the key's own; of a checkpoint, its arrays unpacked, too."""
    found = {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != rundir.KEY}
    for arrays in directory.glob("checkpoints/*/arrays"):
        try:
            leaves = jax.tree.leaves(ocp.StandardCheckpointer().restore(arrays.absolute()))
        except Exception:  # a kill left half of it
            continue
        found[str(arrays)] = b"\0".join(np.asarray(x).tobytes() for x in leaves)
    return found


def fingerprints(directory):
    """Hashes of the data that a run was on, if it has begun."""
    if not (directory / "config.json").exists():
        return []
    task = json.loads((directory / "config.json").read_text())["config"]["task"]
    return [identity.fingerprint(spec.one(task, registry.TASKS, "--task").data)]


def leaks(directory, content):
    """Files of a run that hold the secret, or anything that is drawn with."""
    drawn = [Secret(content), *(Secret(content).of(found) for found in fingerprints(directory))]
    hidden = [x for secret in drawn for x in (secret._content, secret.words().tobytes(), bytes(secret.seed()))]
    needles = {form for x in hidden for form in forms(x)}
    files = everything(directory)
    return [path for path, held in files.items() if any(needle in held for needle in needles)], len(files)


def test_a_leak_would_be_found(tmp_path):
    hidden = Secret.fresh()
    for number, text in enumerate(
        (hidden._content, hidden.words(), hidden.words().tolist(), hidden.seed().hex(), hidden.words().byteswap())
    ):
        content = text.tobytes() if isinstance(text, np.ndarray) else text
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / f"{number}").write_bytes(b"..." + content + b"...")
    assert len(leaks(tmp_path, hidden._content)[0]) == 5
    assert leaks(tmp_path, Secret.fresh()._content)[0] == []


def a_run(cli, directory, size, *flags, code=0):
    """A private run on data of its own in ``directory``; what it says."""
    x = np.random.default_rng(size).normal(size=(6 * size, DIM))
    np.savez(directory.with_suffix(".npz"), x=x, y=np.arange(6 * size) % 2, offsets=np.arange(0, 6 * size + 1, size))
    task = (
        f"--task=npz({str(directory.with_suffix('.npz'))!r}, hidden=(), classes=2)",
        "--cohort_size=2",
        "--sampler=poisson",
    )
    private = "--delta=0.01", "--uplink=clip_by_global_norm(0.3)|gaussian(8.0)", "--eval_every=2", "--rounds=2"
    found, out, err = cli(*task, *private, *flags, f"--workdir={directory}")
    assert found == code, err
    return out, err


MOST = 2 * 0.3 * 6 / 2  # the norm of two rounds' updates, if six clients took part in both


def updates_in(directory):
    """F1 on a directory: for each whole number in its configuration, the updates' sum if all noise came from it."""
    config = json.loads((directory / "config.json").read_text())["config"]
    task = fc.tasks.npz(re.search("'(.*)'", config["task"])[1], hidden=(), classes=2)
    links = privacy.chain(config["uplink"], None)
    here = fc.fedavg(
        task.per_example_loss, optax.sgd(0.1), uplink=links, reducer=fc.reduce.fixed_mean(config["cohort_size"])
    )
    start = jax.tree.map(np.asarray, task.init(keys.seeded(config["seed"])))
    with np.load(directory / "params.npz") as arrays:
        published = np.concatenate([arrays[name].ravel() for name in sorted(arrays.files)])
    numbers = {int(n) for n in re.findall(r"\b\d{1,9}\b", json.dumps(config))}
    nobody = fc.data.sampling.Sampler(lambda sizes, seed, round: np.zeros(0, int))
    for hidden in [None, *map(Secret.of_seed, sorted(numbers))]:
        seeds = sorted(numbers) if hidden is None else [config["seed"]]
        for seed in seeds:
            noise = fc.train(
                here, task.data, start, rounds=2, sampler=nobody, seed=seed, secret=hidden, rounds_per_dispatch=2
            )
            yield np.linalg.norm(
                published - np.concatenate([x.ravel() for _, x in sorted(tree.named_leaves(noise.params))])
            )


def test_a_private_run_keeps_its_key_until_it_is_complete_and_in_no_other_file(cli, tmp_path, monkeypatch):
    here, made = tmp_path / "here", os.urandom(32)
    monkeypatch.setattr(os, "urandom", lambda size: made[:size] if size == 32 else bytes(size))
    seen, modes = [], []

    def look(self, row):
        add(self, row)
        seen.append(((here / rundir.KEY).stat().st_mode & 0o777, leaks(here, made)[0]))
        if (here / "checkpoints").exists():
            modes.append((here / "checkpoints").stat().st_mode & 0o777)

    add = rundir.RunDirectory.add
    monkeypatch.setattr(rundir.RunDirectory, "add", look)
    out, _ = a_run(cli, here, 4, "--checkpoint_every=1")
    assert seen == [(0o600, [])] * 2
    assert modes == [0o700]
    found, files = leaks(here, made)
    assert (found, files > 4) == ([], True)
    assert {path.name for path in here.iterdir()} == {
        *("config.json", "curves.png", "metrics.jsonl", "model.json", "model.safetensors", "params.npz", "report.html"),
        "tensorboard",
    }
    told = dict(re.findall(r"^(epsilon|protects|from|noise|key|assumes) +(.*)$", out, re.MULTILINE))
    assert re.fullmatch(r"\d\.\d{3} at delta 0.01, of this run", told["epsilon"])
    assert told["protects"] == "one client, all its data in all rounds (add or remove)"
    assert "not from the server" in told["from"]
    assert told["noise"] == "the server's, on each round's sum; Poisson cohorts of 2 expected, of 5 clients"
    assert told["key"] == "noise and cohorts come from a secret key of 256 bits, which was removed"
    assert privacy.WITHHELD in told["assumes"]
    page = (here / "report.html").read_text()
    assert "a secret key of 256 bits, which was removed" in page
    assert "not private" not in out + page
    assert min(updates_in(here)) > MOST
    before = everything(here)
    assert (
        a_run(cli, here, 4, "--checkpoint_every=1")[0]
        == f"Complete already (2 rounds); remove {here} to run it again.\n{out}"
    )
    assert everything(here) == before
    assert a_run(cli, here, 4, "--rounds=6", code=2)[1].endswith(
        f"error: --rounds=6: {here} is a private run that was complete after 2 rounds, and its secret key was removed, so "
        "no more can be added: name another --workdir.\n"
    )
    kept = (here / "params.npz").read_bytes()
    for damage, said in (
        (lambda file: file.write_bytes(kept[:-30]), "is damaged or missing"),
        (os.mkfifo, "is no file"),
    ):
        (here / "params.npz").unlink()
        damage(here / "params.npz")  # a pipe was waited for without end, SIGTERM or not
        assert f"params.npz {said}" in a_run(cli, here, 4, "--checkpoint_every=1", code=2)[1]
    (here / "params.npz").unlink()
    assert "secret.key, from which the noise of 2 rounds was drawn, is gone" in a_run(cli, here, 4, code=2)[1]


def test_withheld_metrics_depend_on_no_data_and_no_draw_and_a_known_key_is_said_to_be(cli, tmp_path):
    """Two runs of one known key, on different data, differ in what epsilon covers, and in nothing else."""
    told = {name: a_run(cli, tmp_path / name, size, "--private_seed=3") for name, size in (("a", 4), ("b", 9))}
    rows = {name: rundir.read_rows(tmp_path / name) for name in told}
    files = {name: {path.name for path in (tmp_path / name).iterdir()} for name in told}
    allowed = {"round", "epsilon", "uplink/1/noise_std"}
    assert all(set(row) - {"eval/clients/accuracy", "eval/clients/loss"} == allowed for row in rows["a"])
    for key in allowed:
        assert [row[key] for row in rows["a"]] == [row[key] for row in rows["b"]]
    assert files["a"] == files["b"]
    assert "clients.npz" not in files["a"]
    (events,) = (tmp_path / "a" / "tensorboard").iterdir()
    assert b"noise_std" in events.read_bytes()
    assert b"client_norm" not in events.read_bytes()
    assert "examples" not in told["a"][1].splitlines()[0]
    said = "not private: its noise can be computed from --private_seed=3"
    assert said in told["a"][0]
    assert said in (tmp_path / "a" / "report.html").read_text()
    assert min(updates_in(tmp_path / "a")) <= MOST


def test_what_may_be_published_is_named():
    names = {"loss", "seconds", "clients", "uplink/0/threshold", "uplink/1/threshold", "uplink/1/clipped"}
    shown = privacy.publishable("quantile_clip(0.5, bits_noise=2.0)|gaussian(1.0)")
    assert [name for name in sorted(names) if shown(name)] == ["uplink/0/threshold"]
    shown = privacy.publishable("quantile_clip(0.5)|skellam(1.0)")
    assert not any(map(shown, (*names, "uplink/1/noise_std")))  # of a grid: it tells how many came
    shown = privacy.publishable("quantile_clip(bits_noise=2.0, by_layer=True)|gaussian(1.0)")
    assert shown("uplink/0/threshold/w")
    assert not shown("uplink/0/clipped/w")


def test_exact_metrics_are_marked_and_flags_of_privacy_need_a_claim(cli):
    code, out, _ = cli(*PRIVATE, "--rounds=2", "--private_metrics=exact", "--workdir=here")
    assert code == 0
    assert privacy.EXACT in out
    assert privacy.EXACT in pathlib.Path("here/report.html").read_text()
    assert "loss" in json.loads(pathlib.Path("here/metrics.jsonl").read_text().splitlines()[0])
    here = pathlib.Path("here")
    record = json.loads((here / "config.json").read_text())
    for broken in ("yes", {"delta": 0.01}, record["privacy"] | {"delta": "x"}):
        (here / "config.json").write_text(json.dumps(record | {"privacy": broken}))
        with pytest.raises(fc.InvalidInput, match=r"config\.json is not a run's configuration"):
            results.load([here])
    without = [flag for flag in PRIVATE if "delta" not in flag]
    code, out, _ = cli(*without, "--rounds=2", "--workdir=claims-nothing")
    assert code == 0
    assert "noise              not private: its noise can be computed from --seed=0; --delta" in out
    assert "epsilon" not in out
    code, _, err = cli(*PRIVATE, "--non_finite=keep", "--workdir=refused")
    assert (code, "leave it at 'drop'" in err, pathlib.Path("refused").exists()) == (2, True, False)
    for flag in ("--private_seed=3", "--private_metrics=exact"):
        code, _, err = cli(*without, flag)
        assert (code, f"{flag.split('=')[0]} is for runs that claim an epsilon: give --delta, too." in err) == (2, True)


def test_the_epsilon_of_a_deployment_is_not_said_to_be_the_runs_own(cli):
    """F9 of 7d26893: ``noise_cohort=100000`` divides the noise by 33,333, and the last line was ``epsilon 0.9``."""
    links = "--uplink=clip_by_global_norm(0.5)|gaussian(2.0, noise_cohort=100000)"
    code, out, _ = cli(*PRIVATE[:-1], links, "--rounds=2", "--workdir=here")
    assert code == 0
    assert "at delta 0.01, of a deployment with cohorts of 100000, whose noise is simulated; NOT of this run" in out
    row = json.loads(pathlib.Path("here/metrics.jsonl").read_text().splitlines()[0])
    assert "epsilon" not in row
    assert row["deployment_epsilon"] > 0


def test_noise_of_the_samplers_cohort_is_the_runs_own_only_under_its_denominator():
    """``fixed_mean(1)`` with ``noise_cohort=8`` and cohorts of 8 has an eighth of the noise."""
    link = fc.uplink.chain(fc.uplink.clip_by_global_norm(0.5), fc.uplink.gaussian(1.0, noise_cohort=8))
    told = link, fc.data.sampling.poisson(8), 100, 1e-5, None, True
    assert privacy.claim(*told, 1.0)["deployment"] == 8
    assert privacy.claim(*told, 8.0)["deployment"] is None


class Killed(BaseException):
    """A kill, as far as one process can play it."""


def test_killed_while_it_ends_it_is_resumable_or_complete(cli, kills, tmp_path, monkeypatch):
    flags = (*PRIVATE, "--rounds=3", "--checkpoint_every=2", "--workdir=here")
    for name in ("whole", "here"):
        kills.give_key(tmp_path / name, b"k" * 32)
    assert cli(*flags[:-1], "--workdir=whole")[0] == 0
    for module, name, key_is_there in ((files, "sync", True), (secret, "remove", True), (shutil, "rmtree", False)):
        with monkeypatch.context() as patched, pytest.raises(Killed):

            def killed(*_, **__):
                raise Killed

            patched.setattr(module, name, killed)
            patched.setattr("sys.argv", ["run", *flags])
            run.FLAGS(["run", *flags])
            run.main()
        assert (tmp_path / "here" / rundir.KEY).exists() == key_is_there
        assert (tmp_path / "here" / "checkpoints").exists()
    code, out, err = cli(*flags)
    assert code == 0, err
    assert "Complete already (3 rounds)" in out
    assert not (tmp_path / "here" / "checkpoints").exists()
    for name in ("params.npz", "metrics.jsonl"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_at_random_moments_it_ends_with_the_same_bits_and_without_its_key(kills, cli, tmp_path):
    flags, content, rng = (*kills.PRIVATE, "--devices=1"), os.urandom(32), random.Random(4)  # after 7 rows
    for name in ("killed", "undisturbed"):
        kills.give_key(tmp_path / name, content)
    kills.kill(tmp_path / "killed", rng, *flags)
    assert leaks(tmp_path / "killed", content)[0] == []
    kills.finish(tmp_path / "killed", *flags)
    assert cli(*kills.FLAGS, *flags, f"--workdir={tmp_path / 'undisturbed'}")[0] == 0
    for name in ("killed", "undisturbed"):
        assert not (tmp_path / name / rundir.KEY).exists()
        assert not (tmp_path / name / "checkpoints").exists()
        assert leaks(tmp_path / name, content)[0] == []
    assert kills.outcome(tmp_path / "killed") == kills.outcome(tmp_path / "undisturbed")
