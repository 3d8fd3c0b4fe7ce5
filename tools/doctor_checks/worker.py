"""One rank of the smoke test: says where it is, runs collectives, checks and times them.

    python -m tools.doctor_checks.worker '{"rank": 0, "world": 2, ...}'

Every line on stdout is a JSON object. A rank says what comes next, and, when its own preparations
are done, that it is ready: of ranks that wait for each other the one that is missing can be named.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

STAGES = ("import", "rendezvous", "all-reduce", "all-gather", "all-to-all", "end")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_REPEATS = 5


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def bus_factor(name: str, world: int) -> float:
    """busbw over algbw, as nccl-tests define them: what a link carries, whatever the world."""
    share = (world - 1) / world
    return 2 * share if name == "all-reduce" else share


def main() -> int:
    plan = json.loads(sys.argv[1])
    # Whatever becomes of the doctor, no rank stays behind.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != plan["parent"]:
        return 1
    signal.alarm(int(plan["limit"]) + 10)
    say(enter="import")
    _fault(plan, "import")
    import torch
    import torch.distributed as dist

    rank, world, on_gpu = plan["rank"], plan["world"], plan["backend"] == "nccl"
    device = torch.device("cuda", plan["device"]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    say(enter="rendezvous")
    _fault(plan, "rendezvous")
    say(ready=True)
    dist.init_process_group(
        plan["backend"],
        init_method=f"tcp://{plan['address']}:{plan['port']}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=plan["limit"]),
        device_id=device if on_gpu else None,
    )
    for name in STAGES[2:-1]:
        say(enter=name)
        _fault(plan, name)
        wrong, seconds, moved = _collective(name, rank, world, device, plan)
        if wrong:
            say(wrong=name, text=wrong)
            return 1
        rate = moved / seconds / 1e9
        bus = rate * bus_factor(name, world)
        say(done=name, bytes=moved, seconds=seconds, algbw=rate, busbw=bus)
    say(enter="end")
    dist.destroy_process_group()
    return 0


def _collective(
    name: str, rank: int, world: int, device: Any, plan: dict[str, Any]
) -> tuple[str, float, int]:
    """What is wrong ("" if nothing), seconds of one call, bytes as nccl-tests count them."""
    import torch
    import torch.distributed as dist

    count = plan["bytes"] // 4 // world * world
    part = count // world
    mine = torch.full((part if name == "all-gather" else count,), float(rank + 1), device=device)
    if name == "all-to-all":  # rank r sends (r + 1) * 1000 + s to rank s
        to = torch.arange(world, device=device).repeat_interleave(part)
        mine = mine * 1000 + to
    out = torch.empty(count, device=device)
    # A device that hangs must be noticed before the others wait for this rank.
    _settle(device)
    say(ready=True)
    ranks = torch.arange(1, world + 1, device=device, dtype=torch.float32)
    if name == "all-reduce":
        expected = torch.full_like(out, world * (world + 1) / 2)
    elif name == "all-gather":
        expected = ranks.repeat_interleave(part)
    else:
        expected = (ranks * 1000 + rank).repeat_interleave(part)

    def call() -> None:
        if name == "all-reduce":
            out.copy_(mine)
            dist.all_reduce(out)
        elif name == "all-gather":
            dist.all_gather_into_tensor(out, mine)
        else:
            dist.all_to_all_single(out, mine)

    call()
    if plan.get("fault") == {"stage": name, "kind": "wrong"}:
        out[0] += 1
    if not torch.equal(out, expected):
        bad = int((out != expected).nonzero()[0])
        return f"element {bad} is {out[bad].item()}, not {expected[bad].item()}", 1.0, 0
    return "", _time(call, device), count * 4


def _time(call: Callable[[], None], device: Any) -> float:
    import torch.distributed as dist

    dist.barrier()
    _settle(device)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    _settle(device)
    return (time.perf_counter() - start) / _REPEATS


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fault(plan: dict[str, Any], stage: str) -> None:
    """Tests make a rank hang or die."""
    fault = plan.get("fault") or {}
    if fault.get("stage") != stage:
        return
    if fault["kind"] == "hang":
        time.sleep(3600)
    if fault["kind"] == "die":
        raise RuntimeError("made to fail")


if __name__ == "__main__":
    try:
        code = main()
    except Exception as error:  # the last word of a rank, told with its reason
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        say(failed=f"{type(error).__name__}: {(lines or ['no message'])[0]}")
        code = 1
    # gloo's and NCCL's threads can abort an interpreter that ends in order.
    sys.stdout.flush()
    os._exit(code)
