"""One peer in a process of its own: ``python worker.py PEER``, then JSON requests on stdin, a JSON answer to each.

  {"cmd": "setup", "task": "M", "tiny": false, "devices": 2}  ->  {"seconds": 3.1}
  {"cmd": "run", "rounds": 10}                                 ->  {"seconds": 0.05}   a round
  {"cmd": "params", "path": "x.npz"}                           ->  {}
  {"cmd": "quit"}

Anything that fails answers ``{"error": ...}``. A peer is a module of ``workers`` with a class ``Peer(task, devices)``
that has ``run(rounds)``, which returns when the rounds are done, and ``params()``.
"""

import importlib
import json
import os
import sys
import time
import traceback

import numpy as np
import tasks


def main(name: str) -> None:
    """Serves requests until told to quit."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        command = request["cmd"]
        if command == "quit":
            break
        answer: dict[str, object] = {}
        try:
            began = time.perf_counter()
            if command == "setup":
                task = tasks.build(request["task"], request["tiny"])
                peer = importlib.import_module(f"workers.{name}").Peer(task, request["devices"])
                answer["seconds"] = time.perf_counter() - began
            elif command == "run":
                peer.run(request["rounds"])
                answer["seconds"] = (time.perf_counter() - began) / request["rounds"]
            else:
                np.savez(request["path"], **peer.params())
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # some peers leave threads behind


if __name__ == "__main__":
    main(sys.argv[1])
