"""A model checker of secure aggregation: a server that lies, in any order, to real clients, some of whom work for it.

After a run everything that the server holds is put together: the shares it was given (as the client that gave them was
told whose they are), those of its own clients, every key of its own. What it can compute of the messages are the
combinations of masked messages in which each mask that it does not know cancels. There may be one, of at least t - k
honest clients (Bonawitz et al. 2017, Theorem 6.5).

The checker finds what it should: seven clients from which one check each is taken out are all caught.
"""

import itertools
from typing import ClassVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import fedjax_clip as fc
from fedjax_clip.secure import Client, Keys
from fedjax_clip.secure.sharing import SHARE

SESSION = b"round 3"
SIZES = [(4, 3, 0), (4, 3, 1), (5, 3, 0), (5, 4, 1), (5, 4, 2)]  # n, t, k with 2 t > n + k
INVENTED = (97, 98, 99)
COMBINATIONS = {r: np.array(list(itertools.product((-1, 0, 1), repeat=r))) for r in range(1, 8)}


class LyingServer(RuleBasedStateMachine):
    """What a server can say to clients. Every call may be refused, by ``InvalidInput`` and nothing else."""

    client: ClassVar[type[Client]] = Client
    sizes: ClassVar[list[tuple[int, int, int]]] = SIZES
    always: ClassVar[set[str]] = set()
    raw: ClassVar[tuple[type[Exception], ...]] = ()  # of mutants, which may stumble
    runs: ClassVar[dict[str, int]] = {}

    @initialize(
        size=st.integers(0, 99),
        lies=st.sets(st.sampled_from(["share", "mask", "confirm", "reveal", "skip"]), max_size=2),
    )
    def begin(self, size, lies):
        self.n, self.t, self.k = self.sizes[size % len(self.sizes)]
        self.lies = self.always or lies  # the rounds in which it lies
        identities = {u: Ed25519PrivateKey.generate() for u in range(self.n)}
        registry = {u: key.public_key().public_bytes_raw() for u, key in identities.items()}
        self.honest = list(range(self.n - self.k))
        self.spies = {u: identities[u] for u in range(self.n - self.k, self.n)}
        self.clients = {u: self.client(u, self.t, identities[u], registry, SESSION) for u in self.honest}
        self.phase, self.keys, self.private, self.rosters, self.sealed = 0, {}, {}, {}, {}
        self.rows, self.stories, self.signed, self.revealed = [], {}, {}, []
        self.rng = np.random.default_rng(0)

    def ask(self, u, step, *arguments):
        try:
            return getattr(self.clients[u], step)(*arguments)
        except (fc.InvalidInput, *self.raw):
            return None

    def pair(self):
        key = X25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw()
        self.private[public] = key
        return public

    def own_keys(self, signer=None, masking=None):
        """Keys of the server's, under the name of a client of its own, or forged."""
        sealing, masking = self.pair(), masking or self.pair()
        statement = b"keys" + len(SESSION).to_bytes(4) + SESSION + sealing + masking
        return Keys(sealing, masking, signer.sign(statement) if signer else bytes(64))

    @precondition(lambda self: self.phase == 0)
    @rule()
    def advertise(self):
        self.keys = {u: self.ask(u, "advertise") for u in self.honest}
        self.keys |= {c: self.own_keys(identity) for c, identity in self.spies.items()}
        self.phase = 1

    @precondition(lambda self: self.phase == 1)
    @rule(
        lie=st.sampled_from(["drop", "swap", "in the middle", "copy", "another"]),
        victims=st.sets(st.integers(0, 4)),
        v=st.integers(0, 4),
    )
    def share(self, lie, victims, v):
        v, spies = v % self.n, list(self.spies)
        for u in self.honest:
            roster = dict(self.keys)
            if "share" in self.lies and (u in victims or not victims or lie == "copy"):
                others = [w for w in roster if w != u]
                if lie == "drop":
                    roster.pop(v)
                elif lie == "swap":
                    roster[others[0]], roster[others[1]] = roster[others[1]], roster[others[0]]
                elif lie == "in the middle":
                    roster |= {w: self.own_keys() for w in others}
                elif lie == "copy" and spies:  # a client of the server's has another's key for masks
                    roster[spies[0]] = self.own_keys(self.spies[spies[0]], self.keys[v % len(self.honest)].masking)
                elif lie == "another":
                    roster[INVENTED[0]] = self.own_keys()
            if (texts := self.ask(u, "share", roster)) is not None:
                self.rosters[u] = roster
                self.sealed |= {(u, to): text for to, text in texts.items()}
        self.phase = 2

    @precondition(lambda self: self.phase == 2)
    @rule(
        lie=st.sampled_from(["drop", "all", "swap", "tamper"]),
        victims=st.sets(st.integers(0, 4)),
        v=st.integers(0, 4),
    )
    def mask(self, lie, victims, v):
        for u in self.honest:
            inbox = {w: text for (w, to), text in self.sealed.items() if to == u}
            for c, keys in self.rosters.get(u, {}).items():
                if keys.sealing in self.private:
                    inbox[c] = self.from_its_own(c, keys, u)
            if "mask" in self.lies and u in victims and inbox:
                w, other = sorted(inbox)[v % len(inbox)], sorted(inbox)[0]
                if lie == "drop":
                    inbox.pop(w)
                elif lie == "all":
                    inbox.clear()
                elif lie == "swap":
                    inbox[w], inbox[other] = inbox[other], inbox[w]
                elif lie == "tamper":
                    inbox[w] = inbox[w][:-1] + bytes([inbox[w][-1] ^ 1])
            message = self.rng.integers(0, 2**32, 2, np.uint32)
            masked = self.ask(u, "mask", message, inbox)
            if masked is not None and len(self.rows) < 7:
                self.rows.append((u, dict(self.rosters[u]), set(inbox), message, masked))
        self.phase = 3

    def from_its_own(self, c, keys, u):
        """Shares that mean nothing, well sealed."""
        box = ChaCha20Poly1305(fc.secure.agree(self.private[keys.sealing], self.keys[u].sealing))
        return box.encrypt(c.to_bytes(6) + u.to_bytes(6), bytes(2 * SHARE), SESSION)

    @precondition(lambda self: self.phase == 3)
    @rule(
        kind=st.sampled_from(["one story", "parts", "short", "divided", "invented"]),
        victims=st.sets(st.integers(0, 3), min_size=1, max_size=2),
    )
    def confirm(self, kind, victims):
        everyone = list(range(self.n))
        rest = [v for v in everyone if v not in victims]
        for place, u in enumerate(self.honest):
            if "confirm" not in self.lies:
                story = everyone
            elif kind == "one story":
                story = [v for v in everyone if v != min(victims)]
            elif kind == "parts":
                story = victims if u in victims else rest
            else:  # each hears of the target, itself, and no others or as few as will do
                story = list({*victims, u})
                turn = [v for v in rest[place % len(rest) :] + rest[: place % len(rest)] if v != u]
                filling = {"short": [], "divided": turn, "invented": INVENTED}[kind]
                story += filling[: max(0, self.t - len(story))]
            signature = self.ask(u, "confirm", story)
            if signature is not None:
                self.stories[u] = frozenset(story)
                self.signed[u, self.stories[u]] = signature
        self.phase = 4

    @precondition(lambda self: self.phase == 4)
    @rule(kind=st.sampled_from(["others'", "others'", "none"]))
    def reveal(self, kind):
        for u, story in self.stories.items():
            texts = {
                v: text
                for (v, told), text in self.signed.items()
                if v in story and (told == story or "reveal" in self.lies)
            }
            statement = b"survivors" + len(SESSION).to_bytes(4) + SESSION
            statement += b"".join(v.to_bytes(6) for v in sorted(story))
            texts |= {c: identity.sign(statement) for c, identity in self.spies.items() if c in story}
            shares = self.ask(u, "reveal", {} if kind == "none" and "reveal" in self.lies else texts)
            if shares is not None:
                self.revealed.append((u, story, shares))
        self.phase = 5

    @precondition(lambda self: self.phase == 5)
    @rule(back=st.integers(1, 3))
    def once_more(self, back):
        """It goes back to an earlier round, with what it has learnt since."""
        self.phase -= back + 1

    @precondition(lambda self: "skip" in self.lies and 1 <= self.phase < 4)
    @rule()
    def skip(self):
        """A round in which it asks nothing."""
        self.phase += 1

    def learnt(self):
        """``({client: seed}, {public masking key: private key})`` that the server can put together."""
        points = {}
        for u, story, shares in self.revealed:
            for v, share in shares.items():
                points.setdefault(("seed" if v in story else "key", v), {})[u + 1] = share
        for (u, to), text in self.sealed.items():
            sealing = self.rosters[u][to].sealing
            if sealing in self.private:
                box = ChaCha20Poly1305(fc.secure.agree(self.private[sealing], self.keys[u].sealing))
                plain = box.decrypt(u.to_bytes(6) + to.to_bytes(6), text, SESSION)
                for half, what in ((plain[:SHARE], "key"), (plain[SHARE:], "seed")):
                    points.setdefault((what, u), {})[to + 1] = int.from_bytes(half)
        seeds, keys = {}, dict(self.private)
        for (what, v), shares in points.items():
            if len(shares) < self.t or v not in self.clients:
                continue
            secret = fc.secure.join(dict(list(shares.items())[: self.t]))
            if what == "seed":
                seeds[v] = secret
            else:
                key = X25519PrivateKey.from_private_bytes(secret)
                keys[key.public_key().public_bytes_raw()] = key
        return seeds, keys

    def sums(self):
        """``{(client, which of its messages): factor}`` of every sum that the server can compute, computed."""
        seeds, keys = self.learnt()
        columns, unknown, left = {}, np.zeros((len(self.rows), 60), int), []
        for row, (u, roster, inbox, _, masked) in enumerate(self.rows):
            rest = masked.copy()
            if u in seeds:
                rest -= fc.secure.expand(seeds[u], rest)
            else:
                unknown[row, columns.setdefault(u, len(columns))] = 1
            mine = self.keys[u].masking
            for v in inbox:
                theirs, sign = roster[v].masking, 1 if u < v else -1
                known = next(((a, b) for a, b in ((mine, theirs), (theirs, mine)) if a in keys), None)
                if known:
                    rest -= np.uint32(sign % 2**32) * fc.secure.expand(fc.secure.agree(keys[known[0]], known[1]), rest)
                else:
                    unknown[row, columns.setdefault(frozenset((mine, theirs)), len(columns))] += sign
            left.append(rest)
        found = []
        for factors in COMBINATIONS[len(self.rows)]:
            if not factors.any() or (factors @ unknown).any():
                continue
            opened = (factors[:, None] * np.array(left).astype(np.int64)).sum(0) % 2**32
            true = (factors[:, None] * np.array([row[3] for row in self.rows]).astype(np.int64)).sum(0) % 2**32
            if np.array_equal(opened, true):  # else it has joined shares of two polynomials
                found.append(frozenset((self.rows[i][0], i, abs(f)) for i, f in enumerate(factors) if f))
        return set(found)

    def teardown(self):
        if not getattr(self, "rows", None):
            return
        sums = self.sums()
        self.runs["all"] = self.runs.get("all", 0) + 1
        self.runs["open"] = self.runs.get("open", 0) + bool(sums)
        assert len(sums) <= 1, f"the server has computed {len(sums)} sums"
        for one in sums:
            clients = {u for u, _, _ in one}
            assert len(clients) >= max(self.t - self.k, 2), f"the server has opened clients {sorted(clients)}"


def check(machine, runs, steps=9):
    options = settings(
        max_examples=runs,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=options)


def test_no_run_opens_a_message():
    LyingServer.runs.clear()
    check(LyingServer, 200)
    assert LyingServer.runs["open"] > LyingServer.runs["all"] / 20, LyingServer.runs  # and it gets as far as a sum


def without_order(*steps):
    return {step: getattr(Client, step).__wrapped__ for step in steps}


def lax(*unchecked):
    """Says nothing of these counts or strangers."""

    def known(self, what, *arguments):
        return what in unchecked or Client._known(self, what, *arguments)

    def enough(self, what, *arguments):
        return what in unchecked or Client._enough(self, what, *arguments)

    return {"_known": known, "_enough": enough}


SIGNED = {"_agrees": lambda self, v, signature: True}
MUTANTS = {
    "the client of before (F10)": {
        **lax("The survivors", "The signatures", "surviving neighbours", "signatures of the survivors"),
        **SIGNED,
        "always": {"confirm", "reveal"},
    },
    "any order": without_order("mask", "confirm", "reveal"),
    "survivors unsigned": {**SIGNED, "sizes": [(5, 3, 0)], "always": {"confirm", "reveal"}},
    "keys unsigned": {"_authentic": lambda self, v, keys: True, "always": {"share"}},
    "keys twice": {"_check_distinct": lambda self, roster: None, "sizes": [(5, 4, 1)], "always": {"share", "confirm"}},
    "no least number": {
        **lax("survivors", "surviving neighbours", "signatures of the survivors"),
        "always": {"confirm"},
    },
    "no majority": {"_check_majority": lambda self, count: None, "sizes": [(4, 2, 0)], "always": {"confirm"}},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_client_without_a_check_is_caught(name):
    changes = {"raw": (AttributeError,), "runs": {}, **MUTANTS[name]}
    search = {key: changes.pop(key) for key in ("raw", "runs", "sizes", "always") if key in changes}
    mutant = type("Mutant", (Client,), changes)
    machine = type("Lying", (LyingServer,), {"client": mutant, **search})
    with pytest.raises(AssertionError, match="the server has"):
        check(machine, 1000, 9 if name == "any order" else 6)
