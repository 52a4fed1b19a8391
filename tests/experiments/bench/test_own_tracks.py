"""Functions of one's own in the benchmarks: a clip, an algorithm, a link, a mechanism, an attack, a defence."""

import sys

import generated
import pytest
from problems import softmax_loss
from test_robustbench import tiny

import fedjax_clip as fc
from experiments.bench import comm, mechanisms, privacy, robust, rules, threats
from experiments.bench.core import command, lanes
from experiments.config import outside

OWN = '''
import optax

import fedjax_clip as fc


def fedexp(loss, client_tx, server_tx=None, *, epsilon=1e-3, **parts):
    """Another name."""
    return fc.fedavg(loss, client_tx, optax.sgd(epsilon), **parts)


def halved(threshold, by=2.0):
    return fc.clipping.clip_by_global_norm(threshold / by)


def longest(threshold):
    return fc.uplink.clip_by_global_norm(threshold)


def pointed(loss, point, momentum=0.0):
    return fc.fedavg(loss, optax.sgd(point["client_lr"], momentum))


def unbounded(threshold):
    return optax.scale(threshold)


def noisy(threshold):
    return fc.uplink.chain(fc.uplink.clip_by_global_norm(threshold), fc.uplink.gaussian(1.0))


def summed(rounds):
    return fc.uplink.mechanism.tree(rounds)


def number(rounds):
    return rounds


def fewer():
    return fc.compression.qsgd(4)


def nearest(num_bad, cohort_size, chosen=1):
    assert cohort_size == 9
    return fc.reduce.krum(num_bad, chosen)


def backwards(clients, factor=-1.0):
    return fc.attacks.scaling(clients, factor)


def hidden(reducer, clients, z=1.5):
    return fc.attacks.alie(reducer, clients, z)


def nothing():
    raise KeyError("spam")
'''


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch, unrendered):
    monkeypatch.setattr(lanes, "FAST", {})
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outside, "modules", lambda: ["mine"])
    yield
    sys.modules.pop("mine", None)


def test_names_are_parted_outside_of_brackets():
    assert command.split("celgc, mine.halved(by=(1, 2), x='a,(b'),mine.fedexp") == [
        "celgc",
        "mine.halved(by=(1, 2), x='a,(b')",
        "mine.fedexp",
    ]
    assert command.split("") == []


@pytest.mark.parametrize(
    ("text", "knobs"),
    [
        ("mine.fedexp(epsilon=0.5)", ("client_lr", "server_lr")),
        ("mine.halved", ("client_lr", "threshold")),
        ("mine.halved(by=4.0)", ("client_lr", "threshold")),
        ("mine.halved(2.0)", ("client_lr",)),
        ("mine.longest()", ("client_lr", "threshold", "server_lr")),
        ("mine.longest(threshold=2.0)", ("client_lr", "server_lr")),
        ("mine.pointed(momentum=0.9)", ("client_lr", "threshold")),
    ],
)
def test_what_is_written_is_fixed_and_the_rest_is_tuned(text, knobs):
    (rule,) = rules.named([text], rules.RULES).values()
    assert rule.knobs == knobs
    point = dict.fromkeys(("client_lr", *knobs), 0.1)
    assert isinstance(rule.build(softmax_loss, point), fc.extend.Algorithm)


def test_an_argument_reaches_the_clip():
    """A quarter of a threshold of 4 is a threshold of 1."""
    found = rules.named(["celgc", "mine.halved(by=4.0)"], rules.RULES)
    celgc, mine = found["celgc"], found["mine.halved(by=4.0)"]
    track = lanes.probe()
    one, two = (
        lanes.run(track, rule, [{"client_lr": 0.1, "threshold": c}], lanes.plan(track, track.measuring), range(1))
        for rule, c in ((celgc, 1.0), (mine, 4.0))
    )
    assert one.traffic["bytes_up"] == two.traffic["bytes_up"]
    assert lanes.fingerprint(track, mine) != lanes.fingerprint(track, celgc)


def test_a_compressor_of_ones_own_is_an_entry_of_commbench(tmp_path):
    text = "error_feedback(mine.fewer())"
    assert comm.bench(["three_numbers"], ["none", text], 2, tmp_path / "out", quick=True) == 2
    report = (tmp_path / "out/report.md").read_text()
    assert f"| `{text}` |" in report
    assert (tmp_path / "out/three_numbers.png").exists()
    assert comm.bench(["three_numbers"], ["none", text], 2, tmp_path / "out", quick=True) == 0


def test_a_clip_of_ones_own_is_as_private_as_its_bound_says(tmp_path, monkeypatch):
    generated.install(tmp_path / "generated", monkeypatch)
    track = privacy.problem(quick=True)
    found = mechanisms.named(["gaussian", "tree", "mine.halved(by=4.0)", "mine.longest", "mine.summed"])
    gaussian, tree, clip, link, mine = (found[name] for name in found)

    def noise(private):
        return private.noise(2.0, mechanisms.sampled_by(track, private), 1e-2)

    assert noise(gaussian) == noise(clip) == noise(link)
    assert noise(tree) == noise(mine)
    params, point = track.start(0), {"client_lr": 0.5, "threshold": 2.0, "noise": 1.0}
    for private, bound in ((clip, 0.25), (link, 1.0)):
        assert float(private.link(1.0, 1.0, track).promises.bound(((), ()), params)) == bound
        assert isinstance(private.algorithm(track.loss, point, track), fc.extend.Algorithm)
    assert mine.sampler is tree.sampler


def test_attacks_and_defences_of_ones_own_are_compared(tmp_path):
    attacks, defences = ["mine.backwards(-2.0)", "mine.hidden"], ["mean", "mine.nearest(chosen=2)"]
    assert robust.compare([tiny()], attacks[:1], defences, 1, tmp_path / "out", quick=True) == 2
    report = (tmp_path / "out/report.md").read_text()
    assert "| mine.backwards(-2.0) |" in report
    assert "mine.nearest(chosen=2)" in report
    assert robust.compare([tiny()], attacks[:1], defences, 1, tmp_path / "out", quick=True) == 0
    hidden = threats.attacks_named(attacks, tiny())["mine.hidden"]
    assert hidden.collude(tiny(), fc.reduce.median()).zero is not fc.reduce.median().zero


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rules.named(["mine.fedexq"], {}), "--rules: the module mine has no fedexq"),
        (lambda: rules.named(["mine.fedexp(epsilom=1)"], {}), 'no argument "epsilom"; did you mean "epsilon"'),
        (lambda: rules.named(["mine.halved(on=1)"], {}), r"it is mine.halved\(threshold=tuned, by=2.0\)"),
        (lambda: rules.named(["mine.fedexp("], {}), "--rules: cannot read"),
        (lambda: rules.named(["mine.nothing"], {}), r"--rules: mine.nothing must take \(loss, client_tx\)"),
        (lambda: mechanisms.named(["mine.unbounded"]), "bound"),
        (lambda: mechanisms.named(["mine.noisy"]), "adds noise of its own"),
        (lambda: mechanisms.named(["mine.number"]), "must return a thing of type Mechanism, not int"),
        (lambda: threats.defences_named(["mine.nothing"], tiny()), r"--defences: mine.nothing: KeyError: 'spam'"),
        (lambda: threats.defences_named(["mine.fewer"], tiny()), "must return a thing of type Reducer, not Compressor"),
        (lambda: threats.attacks_named(["mine.fewer"], tiny()), "mine.fewer"),
    ],
)
def test_a_wrong_one_is_one_sentence(call, words):
    with pytest.raises(fc.InvalidInput, match=words):
        call()
