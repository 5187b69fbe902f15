"""Stand-ins for the three programs of a cluster, just true enough to their documented interface.

`standin.py gateway H:P` streams answers as the OpenAI API does and counts them in /metrics. `standin.py operator
FOLDER` writes status files: one replica, three a moment after the mode is Auto, one again later. `standin.py sleep`
waits for SIGTERM, `sleep-deaf` does not listen to it, `child PIDFILE` starts a child that listens to nothing, `fail`
ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LAYERS = 30
SCALED_AFTER_S, COMPLETE_AFTER_S, SHRUNK_AFTER_S = 0.7, 1.2, 2.6
# The answer to a prompt is the prompt's words, so a client can check it.
WORDS_MAX = 4


def gateway(listen: str) -> None:
    """Serves until SIGTERM."""
    from aiohttp import web

    served = {"requests": 0}

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "smollm2", "object": "model"}]})

    async def metrics(_request: web.Request) -> web.Response:
        count = served["requests"]
        lines = [
            'layercast_gateway_requests_waiting{model="smollm2"} 2',
            'layercast_gateway_requests_in_flight{model="smollm2"} 3',
            f'layercast_gateway_handoffs_total{{model="smollm2"}} {count}',
            f'layercast_gateway_ttft_seconds_bucket{{model="smollm2",le="0.1"}} {count}',
            f'layercast_gateway_ttft_seconds_bucket{{model="smollm2",le="+Inf"}} {count}',
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        served["requests"] += 1
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = body["messages"][0]["content"].split()[: min(WORDS_MAX, body["max_tokens"])]
        for delta, reason in [*(({"content": f"{word} "}, None) for word in words), ({}, "stop")]:
            event = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.get("/metrics", metrics)])
    app.add_routes([web.post("/v1/chat/completions", chat)])
    host, port = listen.rsplit(":", 1)
    web.run_app(app, host=host, port=int(port), print=None)


def operator(folder: Path) -> None:
    """Writes a status file ten times a second until SIGTERM."""
    auto_at = None
    while True:
        if auto_at is None and "mode: Auto" in (folder / "modelservices/smollm2.yaml").read_text():
            auto_at = time.time()
        scratch = folder / "status/.smollm2.json"
        scratch.write_text(json.dumps(status(auto_at, time.time())))
        scratch.rename(folder / "status/smollm2.json")
        signal.sigtimedwait([], 0.1)


def status(auto_at: float | None, now: float) -> dict[str, object]:
    """The status at `now`."""
    decided = None if auto_at is None else auto_at + SCALED_AFTER_S
    scaled = decided is not None and decided <= now
    shrunk = auto_at is not None and now >= auto_at + SHRUNK_AFTER_S
    complete = auto_at is not None and now >= auto_at + COMPLETE_AFTER_S
    count = 3 if scaled and not shrunk else 1
    replicas = [
        {
            "replicaId": f"smollm2-{number}",
            "node": f"node-{number}",
            "device": "cpu:0",
            "state": "serving" if number == 0 or complete else "live",
            "layersResident": LAYERS if number == 0 or complete else LAYERS // 2,
            "layersTotal": LAYERS,
        }
        for number in range(count)
    ]
    serving = sum(1 for each in replicas if each["state"] == "serving")
    counts = {"desired": count, "serving": serving, "loading": count - serving, "draining": 0}
    scales = [] if decided is None or not scaled else [scale(decided, complete=complete)]
    return {"name": "smollm2", "counts": counts, "replicas": replicas, "scales": scales}


def scale(decided: float, *, complete: bool) -> dict[str, object]:
    replica = {"replicaId": "smollm2-1", "node": "node-1", "source": "node-0", "bytesPerSecond": 5e7}
    replica |= {"assignedAt": decided + 0.01, "firstTokenAt": decided + 0.1}
    replica["completeAt"] = decided + COMPLETE_AFTER_S - SCALED_AFTER_S if complete else None
    return {
        "decidedAt": decided,
        "from": 1,
        "to": 3,
        "reason": "queue",
        "policy": "live",
        "replicas": [replica],
    }


def child(pid_file: Path) -> None:
    """Starts a child that no signal but SIGKILL ends, and ends on SIGTERM without ending it."""
    started = subprocess.Popen([sys.executable, "-S", __file__, "sleep-deaf"])
    scratch = pid_file.with_suffix(".new")
    scratch.write_text(str(started.pid))
    scratch.rename(pid_file)
    print("ready", flush=True)
    signal.pause()


def main() -> None:
    """Plays the part named by the first argument."""
    part, rest = sys.argv[1], sys.argv[2:]
    if part == "fail":
        print("port 1 is in use", file=sys.stderr)
        sys.exit(2)
    if part == "gateway":
        gateway(rest[0])
    elif part == "operator":
        operator(Path(rest[0]))
    elif part == "child":
        child(Path(rest[0]))
    elif part == "sleep-deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", os.getpid(), flush=True)
        while True:
            signal.pause()
    else:
        signal.pause()


if __name__ == "__main__":
    main()
