"""``--distributed``: several processes, on one machine or many, that train together by ``jax.distributed``."""

import faulthandler
import functools
import os
import re
import socket
import sys
import threading
from typing import Any, NoReturn, TextIO

from absl import flags

from fedjax_clip.core.types import InvalidInput

HELP = (
    "Train in several processes together: auto, if Slurm, Open MPI, Kubernetes, a Cloud TPU or experiments.launch "
    "starts them, or ADDRESS:PORT,PROCESSES,NUMBER with the address of process 0 and the number of this one."
)
ADDRESSED = "ADDRESS:PORT,PROCESSES,NUMBER such as 10.0.0.1:9876,4,0"
HEARTBEAT = 40  # seconds after which a process that is silent counts as dead, and all end
JOIN = 40  # seconds in which all processes must have come; $FEDJAX_CLIP_JOIN_SECONDS takes its place
LEAVE = 5  # seconds in which all processes fail, if they fail alike
SILENT = r"gloo|nccl|coordination service|heartbeat|barrier|connection (closed|reset|refused)|socket closed"
LOST = (
    "another process has ended, so all end; it has said why, unless it was killed. The same command goes on from the "
    "last checkpoint."
)

_joined, _number = False, 0


def define_flag() -> None:
    """Defines ``--distributed``."""
    flags.DEFINE_string("distributed", None, HELP)


def join(asked: str | None) -> None:
    """Makes this process one of several, if ``asked``; returns when all have come.

    JAX's notice of preemption is off: our handler of SIGTERM would silence it, and before there is one, the signal
    should end the process.

    Args:
      asked: the value of ``--distributed``.

    Raises:
      InvalidInput: no such value, nobody who started several processes, or an address that cannot be used.
    """
    global _joined
    if asked is None:
        return
    import jax

    address, count, number = _read(asked)
    if address is None:
        _refuse_idle_gpus()
    elif number == 0:
        _check_port(asked, address)
    patience = _seconds()
    faulthandler.disable()  # absl's, which would bury what JAX says when another process dies
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(5, _say_what_it_waits_for, (address, count, patience))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except Exception as error:
        raise InvalidInput(_why_not(asked, error)) from error
    finally:
        waiting.cancel()
    _joined = True


def silence() -> None:
    """Leaves standard output and error to process 0; ``stderr`` is for what another process must say."""
    global _number
    if not _joined:
        return
    import jax

    _number = jax.process_index()
    nothing = os.open(os.devnull, os.O_WRONLY)
    own = nothing if follows() else os.dup(1)
    sys.stdout.flush()
    os.dup2(nothing, 1)  # where Gloo chatters
    sys.stdout = open(own, "w", errors="backslashreplace")  # noqa: SIM115 (it stays open)
    if follows():
        sys.stderr = sys.stdout


def follows() -> bool:
    """Whether this is one of several processes, and not the first: that one speaks, and writes the run directory."""
    return _number > 0


def stderr() -> TextIO:
    """Where a process says why it fails, even one that is silent otherwise."""
    return sys.__stderr__ if follows() and sys.__stderr__ else sys.stderr


def alone() -> bool:
    """Whether no other processes have been joined."""
    return not _joined


@functools.cache
def fail_together() -> bool:
    """Whether all processes fail within ``LEAVE`` seconds; to be called by one that fails."""
    if alone():
        return True
    try:
        _client().wait_at_barrier("fedjax_clip/fail", LEAVE * 1000)
    except Exception:  # the others train on, or one is dead
        return False
    return True


def leave(code: int) -> NoReturn:
    """Ends this process, which has failed, with a code. The others notice, even while they wait for it."""
    if fail_together():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit would wait for the others


def stopped(signal: int | None) -> int | None:
    """The signal that stops all processes, if this one or another has had one."""
    if signal is not None:
        _client().key_value_set("fedjax_clip/signal", str(signal), allow_overwrite=True)
        return signal
    told = _client().key_value_dir_get("fedjax_clip/")  # which raises nothing if there is none
    return next((int(value) for _, value in told), None)


def lost(error: BaseException | None) -> bool:
    """Whether an error says that another process has ended."""
    if alone() or error is None:
        return False
    raised = isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, InvalidInput)  # by JAX
    told = raised and re.search(SILENT, str(error), re.IGNORECASE)
    return bool(told) or lost(error.__cause__ or error.__context__)


def _client() -> Any:
    """JAX's client of its coordination service, by the accessor that Orbax has for it."""
    import orbax.checkpoint as ocp

    return ocp.multihost.get_jax_distributed_client()


def _read(asked: str) -> tuple[str | None, int | None, int | None]:
    """Address of process 0, number of processes, and number of this one; all ``None`` if JAX finds them out."""
    if asked == "auto":
        return None, None, None
    found = re.fullmatch(r"([^,\s]+:(\d{1,5})),(\d{1,6}),(\d{1,6})", asked)
    if found is None or not 0 < int(found[2]) < 65536:
        raise InvalidInput(f"--distributed={asked} is not understood: write auto, or {ADDRESSED}. Ports end at 65535.")
    count, number = int(found[3]), int(found[4])
    if number >= count:
        raise InvalidInput(
            f"--distributed={asked}: of {count} processes there is no number {number}: they count from 0."
            if count
            else f"--distributed={asked}: the number of processes must be 1 or more."
        )
    return found[1], count, number


def _seconds() -> int:
    text = os.environ.get("FEDJAX_CLIP_JOIN_SECONDS") or str(JOIN)
    if not text.isdecimal() or not 0 < int(text) < 1_000_000:
        raise InvalidInput(f"$FEDJAX_CLIP_JOIN_SECONDS must be a number of seconds, not {text!r}.")
    return int(text)


def _refuse_idle_gpus() -> None:
    """Refuses a Slurm step with fewer tasks than GPUs on a node: JAX gives each task one GPU."""
    of = os.environ.get
    tasks = re.match(r"\d+", of("SLURM_STEP_TASKS_PER_NODE") or of("SLURM_NTASKS_PER_NODE") or "")
    gpus = of("SLURM_GPUS_ON_NODE", "")
    if tasks is None or not gpus.isdecimal() or "SLURM_PROCID" not in os.environ or of("JAX_LOCAL_DEVICE_IDS"):
        return
    if int(tasks[0]) < int(gpus):
        ids = ",".join(map(str, range(int(gpus))))
        raise InvalidInput(
            f"--distributed=auto: this node has {gpus} GPUs and {tasks[0]} of the tasks, and JAX gives each task one "
            f"GPU: ask srun for --ntasks-per-node={gpus}, or set JAX_LOCAL_DEVICE_IDS={ids} for one task a node."
        )


def _check_port(asked: str, address: str) -> None:
    """Refuses a port that another program has: JAX's service would crash."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise InvalidInput(
                f"--distributed={asked}: this port cannot be used here ({error.strerror}): choose another."
            ) from None


def _say_what_it_waits_for(address: str | None, count: int | None, seconds: int) -> None:
    all_of_them = "all" if count is None else f"all {count}"
    place = "" if address is None else f" at {address}"
    print(
        f"Waiting for {all_of_them} processes to start and to reach process 0{place}, at most {seconds} seconds.",
        file=sys.stderr,
    )


def _why_not(asked: str, error: Exception) -> str:
    if isinstance(error, ValueError):  # JAX found no address or number
        return (
            "--distributed=auto: nothing here started several processes, neither Slurm nor Open MPI, Kubernetes, a "
            f"Cloud TPU or experiments.launch: start them with one of those, or write {ADDRESSED}."
        )
    return f"--distributed={asked}: the processes cannot reach each other: {' '.join(str(error).split())[:200]}."
