"""The server: it asks clients through Flower's grid, and makes each round's step by the algorithm's other half."""

import importlib.util
import json
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid, ServerApp

import fedjax_clip as fc
from fedjax_clip import deploy

app = ServerApp()


class Trips:
    """Trips to the clients through Flower's grid, and the bytes that Flower adds to what they carry."""

    def __init__(self, grid: Grid, num_clients: int, seconds: float):
        self.grid, self.seconds, self.overhead = grid, seconds, 0
        self.nodes: dict[int, int] = {}  # by client number
        while len(self.nodes) < num_clients:
            strangers = set(grid.get_node_ids()) - set(self.nodes.values())
            replies = self._sent({node: {} for node in strangers}, "query")
            self.nodes |= {int(answer["number"]): node for node, answer in replies.items()}
            time.sleep(0.2)

    def __call__(self, notes: Mapping[int, deploy.Note]) -> dict[int, deploy.Note]:
        """The answers that came, by client number."""
        numbers = {self.nodes[c]: c for c in notes}
        replies = self._sent({self.nodes[c]: note for c, note in notes.items()}, "train")
        return {numbers[node]: answer for node, answer in replies.items()}

    def _sent(self, notes: Mapping[int, deploy.Note], kind: str) -> dict[int, deploy.Note]:
        if not notes:
            return {}
        online = set(self.grid.get_node_ids())  # a note to a node that is gone would wait for it
        sent = [
            Message(RecordDict({"note": ConfigRecord(note)}), dst_node_id=node, message_type=kind, ttl=self.seconds)
            for node, note in notes.items()
            if node in online
        ]
        answers = {}
        for reply in self.grid.send_and_receive(sent, timeout=self.seconds):
            if reply.has_error():
                print(f"node {reply.metadata.src_node_id}: {reply.error.reason}", flush=True)
                continue
            answers[reply.metadata.src_node_id] = dict(reply.content.config_records["answer"])
            self.overhead += _added(reply)
        self.overhead += sum(map(_added, sent))
        return answers


def _added(message: Message) -> int:
    """The bytes of a message's records beyond the values in them: names, lengths, numbers."""
    values = [x for record in message.content.config_records.values() for x in record.values()]
    values = [x for value in values for x in (value if isinstance(value, list) else [value])]
    return recorddict_to_proto(message.content).ByteSize() - sum(len(x) for x in values if isinstance(x, bytes))


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of a run; rows go to ``rows.jsonl`` in the server's directory, parameters to ``params.npz``."""
    home = pathlib.Path(str(context.run_config["server"]))
    spec = importlib.util.spec_from_file_location("problem", home / "problem.py")
    assert spec is not None
    assert spec.loader is not None
    problem = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(problem)
    plan = json.loads((home / "plan.json").read_text())
    algorithm = problem.algorithm(plan["algorithm"])
    halves = deploy.Halves(algorithm, deploy.Population(len(plan["sizes"]), float(sum(plan["sizes"]))), plan["seed"])
    artefact = deploy.Artefact.load(home / "client.zip")
    rounds = deploy.Rounds(halves, artefact, problem.params(), problem.examples())
    trips = Trips(grid, len(plan["sizes"]), float(context.run_config["seconds"]))
    sampler = fc.data.sampling.uniform(plan["cohort_size"])
    with (home / "rows.jsonl").open("w") as rows:
        for number in range(int(context.run_config["rounds"])):
            trips.overhead = 0
            ids = sampler.sample(np.array(plan["sizes"]), plan["seed"], number).tolist()
            row = rounds.run(ids, trips)
            print(json.dumps({"ids": ids, **row, "traffic": vars(rounds.traffic), "flower": trips.overhead}), file=rows)
            rows.flush()
    leaves = jax.tree.leaves(rounds.params)
    with fc.core.files.replacing(home / "params.npz") as file:
        np.savez(file, *map(np.asarray, leaves))
