"""The clients' states of several processes on disk: each keeps its own clients', and any number goes on from them."""

import threading

import numpy as np
import pytest

import fedjax_clip as fc
from fedjax_clip.training import owned
from fedjax_clip.training.processes import Processes
from fedjax_clip.training.rows import OnDisk

CLIENTS = 11
ALIKE = {"a": np.zeros((CLIENTS, 3), np.float32), "b": np.zeros((CLIENTS,), np.int8)}


class Threads(Processes):
    """Processes of a test, each a thread with one device."""

    def __init__(self, number, count, barrier, told):
        self.number, self.count, self.own = number, count, [number]
        self.barrier, self.told = barrier, told

    def gather(self, values):
        self.told[self.number] = np.array(values)
        self.barrier.wait(10)
        came = np.stack([self.told[process] for process in range(self.count)])
        self.barrier.wait(10)
        return came

    def whole(self, values):
        return values


def together(count, work):
    """What ``work(processes)`` returns, or raises, in each of so many processes."""
    barrier, told, done = threading.Barrier(count), {}, {}

    def run(number):
        try:
            done[number] = work(Threads(number, count, barrier, told))
        except Exception as error:
            done[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [done[number] for number in range(count)]


def states_of(ids, round):
    """New states of these clients after a round, ``[*ids.shape, ...]``."""
    return {"a": (100 * round + ids[..., None] + np.zeros(3)).astype(np.float32), "b": (ids + round).astype(np.int8)}


def cohort(round, count):
    """Clients ``[P, 1, 3]`` of a round; -1 is no client."""
    ids = np.random.default_rng(round).permutation(CLIENTS)[: 3 * count - 1]
    return np.append(ids, -1).reshape(count, 1, 3)


def played(directory, count, rounds, restored=None, kept=()):
    """Plays some rounds by so many processes, and saves each; the states of all clients as each process saw them."""

    def work(processes):
        disk = OnDisk(ALIKE, directory, processes)
        if restored is not None:
            disk.restore(restored, kept)
        states = owned.Owned(disk)
        with states.held():
            for round in rounds:
                ids = cohort(round, count)
                states.gather(ids)
                states.scatter(ids, states_of(ids, round))
                disk.save(round)
                disk.spare([round, round - 1])
            everybody = np.arange(CLIENTS + count - CLIENTS % count).reshape(count, -1)
            ids = np.where(everybody < CLIENTS, everybody, -1)
            part = states.gather(ids)
            owned.finish(states)
            return ids[processes.own], part, {name: np.asarray(leaf) for name, leaf in disk.tree.items()}

    results = together(count, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def expected(rounds):
    """The states after these rounds, each with the number of processes that played it."""
    found = {name: x.copy() for name, x in ALIKE.items()}
    for round, count in rounds:
        ids = cohort(round, count)
        new = states_of(ids, round)
        for name in found:
            found[name][ids[ids >= 0]] = new[name][ids >= 0]
    return found


def test_any_number_of_processes_goes_on_from_states_on_disk(tmp_path):
    done = []
    for count, rounds in ((2, range(3)), (3, range(3, 6)), (1, range(6, 8)), (2, range(8, 12))):
        last = rounds.start - 1
        results = played(tmp_path, count, rounds, last if done else None, [last, last - 1])
        done += [(round, count) for round in rounds]
        wanted = expected(done)
        for ids, part, whole in results:
            for name, x in wanted.items():
                np.testing.assert_array_equal(part[name][ids >= 0], x[ids[ids >= 0]])
                np.testing.assert_array_equal(whole[name], x)
    assert sorted(path.name for path in tmp_path.iterdir())[:4] == [
        "10.0-of-2.index",
        "10.1-of-2.index",
        "11.0-of-2.index",
        "11.1-of-2.index",
    ]


def test_a_process_does_not_take_another_ones_state_for_the_first_one(tmp_path):
    def work(processes):
        return OnDisk(ALIKE, tmp_path, processes).gather(np.array([0, 1]))

    for number, error in enumerate(together(2, work)):
        assert isinstance(error, fc.InvalidInput)
        assert f"client {1 - number} is kept by process {1 - number}, and not readable in process {number}" in str(
            error
        )


def test_a_missing_part_of_the_index_is_an_error(tmp_path):
    played(tmp_path, 2, range(1))
    (tmp_path / "0.1-of-2.index").unlink()
    with pytest.raises(ValueError, match="a part of the index is missing"):
        OnDisk(ALIKE, tmp_path).restore(0, [0])
