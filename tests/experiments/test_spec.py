"""Component specs: what is read, and that everything else ends in one sentence and runs nothing."""

import math
import os

import pytest

from experiments.config import spec
from experiments.config.spec import Call
from fedjax_clip.core.types import InvalidInput


def clip(max_norm: float, *, per_layer: bool = False):
    return "clip", max_norm, per_layer


def sgd(learning_rate, momentum: float | None = None):
    if isinstance(learning_rate, float) and learning_rate <= 0:
        raise ValueError(f"{'sgd: ' * (learning_rate == 0)}the learning rate\nmust be positive")
    return "sgd", learning_rate, momentum


def cosine(init: float, rounds: int, more: tuple = ()):
    return "cosine", init, rounds, more


def broken():
    return None + 1  # type: ignore[operator]


REGISTRY = {"clip_by_global_norm": clip, "sgd": sgd, "broken": broken, "variadic": lambda *xs, **kws: (xs, kws)}
NESTED = {"cosine": cosine}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("", []),
        ("   ", []),
        ("sgd", [Call("sgd")]),
        ("sgd()", [Call("sgd")]),
        (" clip(1.0) | sgd(0.1, momentum=0.9) ", [Call("clip", (1.0,)), Call("sgd", (0.1,), {"momentum": 0.9})]),
        ("a|b|c", [Call("a"), Call("b"), Call("c")]),
        ("a(1, -2, 1e-3, +4, 1_000)", [Call("a", (1, -2, 1e-3, 4, 1000))]),
        ("a(inf, x=-inf)", [Call("a", (math.inf,), {"x": -math.inf})]),
        ("a(True, False, None)", [Call("a", (True, False, None))]),
        ("a('b|c', \"d(e)\")", [Call("a", ("b|c", "d(e)"))]),
        ("a((1, 2), [3, (4,)], ())", [Call("a", ((1, 2), [3, (4,)], ()))]),
        ("a(b(0.1, n=3), [c])", [Call("a", (Call("b", (0.1,), {"n": 3}), [Call("c")]))]),
        ("größe('ü')", [Call("größe", ("ü",))]),
    ],
)
def test_reads(text, calls):
    read = spec.parse(text, "--x")
    assert read == calls
    assert repr(read) == repr(calls)  # 1 == 1.0 == True


def test_reads_nan():
    [call] = spec.parse("a(nan)", "--x")
    assert math.isnan(call.args[0])


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("__import__('os').system('x')", "__import__('os').system('x')"),
        ("a(__import__('os').system('x'))", "__import__('os').system('x')"),
        ("a(b.c)", "b.c"),
        ("a.b", "a.b"),
        ("a(my.npz)", "my.npz"),
        ("a(lambda: 0)", "lambda: 0"),
        ("(lambda: 0)()", "(lambda: 0)()"),
        ("a([x for x in y])", "[x for x in y]"),
        ("a(x for x in y)", "(x for x in y)"),
        ("a(f'{b}')", "f'{b}'"),
        ("a(*b)", "*b"),
        ("a(**b)", "**b"),
        ("a(x=1, x=2)", "x=2"),
        ("a(1 + 1)", "1 + 1"),
        ("a('x' * 10)", "'x' * 10"),
        ("a(b|c)", "b|c"),
        ("a|(b|c)", "b|c"),
        ("a & b", "a & b"),
        ("a(~1)", "~1"),
        ("a(-True)", "-True"),
        ("a(-'x')", "-'x'"),
        ("a(-b)", "-b"),
        ("a(not b)", "not b"),
        ("a(1 if b else 2)", "1 if b else 2"),
        ("a(b[0])", "b[0]"),
        ("a({1: 2})", "{1: 2}"),
        ("a({1})", "{1}"),
        ("a(b'x')", "b'x'"),
        ("a(1j)", "1j"),
        ("a(...)", "..."),
        ("a((b := 1))", "b := 1"),
        ("a(1e999)", "1e999"),
        ("a(-1e999)", "1e999"),
        ("a()()", "a()()"),
        ("'a'(1)", "'a'(1)"),
        ("0.1", "0.1"),
        ("a, b", "a, b"),
        ("(a)", "(a)"),
        ("a(1) # |b", "a(1) # |b"),
        ("a(1", "a(1"),
        ("a(1))", "a(1))"),
        ("a)|(b", "a)|(b"),
        ("a|", "a|"),
        ("|a", "|a"),
        ("a||b", "a||b"),
        ("a(=1)", "a(=1)"),
        ("a(x=1, 2)", "a(x=1, 2)"),
        ("a; b", "a; b"),
        ("a = 1", "a = 1"),
        ("import os", "import os"),
        ("a('b)", "a('b)"),
        ("a('\\d')", r"a('\\d')"),
        ("a(1if b else 2)", "a(1if b else 2)"),
        ("a\0b", r"a\x00b"),
        ("a('\udcff')", r"a('\udcff')"),
        ("a(€)", "a(€)"),
        ("a\n|b", r"a\n|b"),
        ("(" * 5000 + "a" + ")" * 4999, "((("),
        ("a(" * 150 + "-" * 3000 + "1" + ")" * 150, "a(a("),
        ("a(" + "-" * 9000 + "1)", "a(---"),
        ("a" + "|a" * 4999, "a|a|a"),
        ("a(" + "9" * 5000 + ")", "a(999"),
        ("a" * 10**6, "aaa"),
    ],
)
def test_refuses_in_one_sentence_that_quotes_the_piece(text, quoted):
    def ran(*args, **kwargs):
        raise AssertionError("A refused spec must run nothing.")

    with pytest.raises(InvalidInput) as error:
        spec.build(text, {"a": ran, "b": ran, "__import__": ran}, "--x", {"b": ran})
    message = str(error.value)
    assert message.startswith("--x: ")
    assert f'"{quoted}' in message
    assert "\n" not in message
    assert len(message) < 250


def test_runs_no_code(monkeypatch):
    monkeypatch.setattr(os, "system", lambda *args: pytest.fail("os.system was called"))
    with pytest.raises(InvalidInput, match='unknown component "__import__"'):
        spec.build("__import__('os')", REGISTRY, "--x")
    with pytest.raises(InvalidInput, match='"eval" is not a value; text is written in quotes'):
        spec.build("sgd(eval('1'))", REGISTRY, "--x")


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("", []),
        ("clip_by_global_norm(1.0)|sgd(0.1)", [("clip", 1.0, False), ("sgd", 0.1, None)]),
        ("clip_by_global_norm(max_norm=2, per_layer=True)", [("clip", 2, True)]),
        ("sgd(cosine(0.1, rounds=100))", [("sgd", ("cosine", 0.1, 100, ()), None)]),
        ("sgd([cosine(1, 2, (cosine(3, 4),))])", [("sgd", [("cosine", 1, 2, (("cosine", 3, 4, ()),))], None)]),
        ("variadic(1, 2, three=3)", [((1, 2), {"three": 3})]),
    ],
)
def test_builds(text, built):
    assert spec.build(text, REGISTRY, "--client", NESTED) == built


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "clip_by_globl_norm(1)",
            '--client: unknown component "clip_by_globl_norm"; did you mean "clip_by_global_norm"? '
            "(valid: broken, clip_by_global_norm, sgd, variadic).",
        ),
        (
            "zzz",
            '--client: unknown component "zzz" (valid: broken, clip_by_global_norm, sgd, variadic).',
        ),
        ("sgd(cosin(1, 2))", '--client: unknown component "cosin"; did you mean "cosine"? (valid: cosine).'),
        ("sgd(sgd(0.1))", '--client: unknown component "sgd" (valid: cosine).'),
        (
            "sgd(0.1, momentun=0.9)",
            '--client: sgd has no argument "momentun"; did you mean "momentum"? '
            "(it is sgd(learning_rate, momentum=None)).",
        ),
        (
            "sgd(momentum=0.9)",
            "--client: sgd: missing a required argument: 'learning_rate' (it is sgd(learning_rate, momentum=None)).",
        ),
        (
            "sgd(1, 2, 3)",
            '--client: sgd has no place for the argument "3" (it is sgd(learning_rate, momentum=None)).',
        ),
        (
            "sgd(1, 2, cosine(1, 2))",
            '--client: sgd has no place for the argument "cosine(...)" (it is sgd(learning_rate, momentum=None)).',
        ),
        (
            "sgd(1, learning_rate=2)",
            "--client: sgd: multiple values for argument 'learning_rate' (it is sgd(learning_rate, momentum=None)).",
        ),
        (
            "sgd(cosine(0.1))",
            "--client: cosine: missing a required argument: 'rounds' (it is cosine(init, rounds, more=())).",
        ),
        ("sgd(-1.0)", "--client: sgd: the learning rate must be positive"),
        ("sgd(0.0)", "--client: sgd: the learning rate must be positive"),
        (
            "cosine(1.0, 2)",
            '--client: "cosine" goes inside of one of these: broken, clip_by_global_norm, sgd, variadic.',
        ),
    ],
)
def test_what_cannot_be_built_names_the_flag_and_the_culprit(text, message):
    with pytest.raises(InvalidInput) as error:
        spec.build(text, REGISTRY, "--client", NESTED)
    assert str(error.value) == message


def test_an_error_inside_a_component_names_flag_and_component():
    with pytest.raises(InvalidInput, match=r"^--client: broken: unsupported operand"):
        spec.build("broken", REGISTRY, "--client")


def test_one():
    assert spec.one("sgd(0.1)", REGISTRY, "--server") == ("sgd", 0.1, None)
    for text, count in (("", 0), ("sgd(0.1)|sgd(0.2)", 2)):
        with pytest.raises(
            InvalidInput, match=rf"--server: exactly one component is needed, not {count} \(valid: broken"
        ):
            spec.one(text, REGISTRY, "--server")
