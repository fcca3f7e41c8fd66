"""Stands in for ``vllm serve`` in test_cli.py: ``python fake_server.py PORT [behaviour] [file for a worker's id]``."""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, BEHAVIOUR = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "well"


class Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.answer(503 if BEHAVIOUR == "never healthy" else 200, "text/plain", "")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if BEHAVIOUR == "fails":
            self.answer(500, "application/json", '{"error": "boom"}')
        elif request.get("stream"):
            parts = [{"choices": [{"delta": {"content": word}}]} for word in ("one", " two")]
            events = [*parts, {"choices": [], "usage": {"completion_tokens": 2}}]
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            self.answer(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))
            if BEHAVIOUR == "crashes later":
                print("ValueError: no more", flush=True)
                os._exit(3)
        else:
            choice = {"message": {"content": "three"}}
            reply = {"choices": [choice], "usage": {"completion_tokens": 1}}
            self.answer(200, "application/json", json.dumps(reply))

    def log_message(self, *_: object) -> None:
        pass


worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("WORKER", worker.pid, "FURTHER OPTIONS", *sys.argv[4:], flush=True)
if len(sys.argv) > 3:
    Path(sys.argv[3]).write_text(str(worker.pid))
if BEHAVIOUR == "dies":
    sys.exit("CUDA error: not really")
if BEHAVIOUR == "raises":
    print("(Worker pid=7) ERROR 01-01 [worker.py:1] torch.OutOfMemoryError: 1 GiB is lacking")
    raise RuntimeError("Engine core initialization failed. See root cause above.")
if BEHAVIOUR == "anonymous":
    print("Starting to load model", flush=True)
else:
    print(
        "INFO 01-01 [model.py:1] LFM2-MoE is served by vllm_model.model.Lfm2MoeForCausalLM.",
        flush=True,
    )
if BEHAVIOUR == "slow":
    time.sleep(1)
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
