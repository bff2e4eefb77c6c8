"""Run by test_wandb.py in a process of its own: a fit that logs to W&B while a fault strikes W&B."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import arena
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from pair import free_port

STEPS = 6
BUCKET = {
    **{"id": "QnVja2V0", "name": "r", "displayName": "r", "config": "{}", "sweepName": None, "historyLineCount": 0},
    "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
}
ANYTHING = {
    "viewer": {"id": "v", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"features": [], "latestLocalVersionInfo": None},
}


class Server(http.server.BaseHTTPRequestHandler):
    """What W&B's server says when a run begins; or garbage."""

    garbage = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if b"UpsertBucket" in body:
            answer: Any = {"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}
        elif b"RunResumeStatus" in body:
            answer = {"data": {"model": None}}
        else:
            answer = {"data": ANYTHING} if self.path == "/graphql" else {}
        text = b"<html>no</html>" if self.garbage else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST  # noqa: N815 - names of http.server

    def log_message(self, *_: Any) -> None:
        pass


class Strike(Callback):
    """After half of the steps: W&B's own process is killed, or its server goes away."""

    def __init__(self, fault: str, server: http.server.HTTPServer | None) -> None:
        self.fault, self.server = fault, server

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != STEPS // 2:
            return
        if self.fault == "server_gone":
            self.server.shutdown()
            self.server.server_close()
        if self.fault == "killed":
            own = [p for p in Path("/proc").glob("[0-9]*") if b"wandb-core" in _cmdline(p)]
            for process in own:
                if f"PPid:\t{os.getpid()}\n" in (process / "status").read_text():
                    os.kill(int(process.name), signal.SIGKILL)


def _cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def main(fault: str, folder: str, model: str, seconds: float) -> None:
    """Train a little; the log of the process is ``said``."""
    os.chdir(folder)
    handle = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    server = None
    port = free_port()
    if fault in ("garbage", "server_gone"):
        Server.garbage = fault == "garbage"
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
    os.environ.pop("WANDB_MODE", None)
    os.environ |= {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "HOME": folder}
    if fault == "killed":
        os.environ["WANDB_MODE"] = "offline"
    from lit_rlhf.callbacks import SafeWandbLogger
    from lit_rlhf.stages import SFT, Optim

    stage = SFT(model, optim=Optim(lr=1e-3))
    loggers = [
        CSVLogger(folder, name="", flush_logs_every_n_steps=1),
        SafeWandbLogger(project="p", save_dir=folder, seconds=seconds),
    ]
    arena.fit(stage, [arena.examples(2)] * STEPS, callbacks=[Strike(fault, server)], logger=loggers)
    loggers[1].log_table("samples", columns=["a"], data=[["b"]], step=STEPS)
    print("trained", flush=True)
    import atexit

    atexit._run_exitfuncs()  # a forked process leaves without it
