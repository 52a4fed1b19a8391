"""The audit: under epsilon where the noise is right, over it for each planted bug."""

import pytest

import fedjax_clip as fc
from experiments import audit, privacy

CONFIDENCE = 0.9999  # a right implementation fails a test of these once in ten thousand seeds; the seed is fixed


def run(text, bug="none", **options):
    uplink, reducer = audit.planted(privacy.links(text), bug, 4)
    return audit.audit(uplink, reducer, **{"replays": 3000, "confidence": CONFIDENCE} | options)


@pytest.mark.parametrize(
    "text",
    [
        "clip_by_global_norm(1.0)|gaussian(2.0)",
        "clip_by_global_norm(0.3)|gaussian(3.0, mechanism=tree(4))",
    ],
)
def test_what_is_right_stays_under_its_epsilon(text):
    found = run(text)
    assert 0.25 * found.epsilon < found.audited < found.epsilon  # and the attack is not idle


@pytest.mark.parametrize("bug", [bug for bug in audit.BUGS if bug != "none"])
def test_each_planted_bug_is_found(bug):
    found = run("clip_by_global_norm(1.0)|gaussian(2.0)", bug)
    assert found.audited > found.epsilon


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: run("clip_by_global_norm(1.0)"), "Only the server's noise is audited"),
        (lambda: run("clip_by_global_norm(1.0)|gaussian(2.0)", replays=0), "replays"),
        (
            lambda: run("clip_by_global_norm(1.0)|gaussian(2.0)", replays=1),
            "whole number between 20 and 100000000, not 1",
        ),
        (lambda: run("clip_by_global_norm(1.0)|gaussian(2.0)", rounds=10**9), "rounds must be a whole number between"),
        (lambda: audit.audit(fc.uplink.gaussian(1.0), confidence=1.0), "confidence"),
        (lambda: run("clip21(1.0)|clip_by_global_norm(1.0)|gaussian(2.0)"), "what clients keep"),
    ],
)
def test_what_cannot_be_audited_is_refused(call, sentence):
    with pytest.raises(fc.InvalidInput, match=sentence):
        call()
