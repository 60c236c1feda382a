#!/usr/bin/env bash
# openai: chunks that `create(stream=True)` reads without complaint come to nothing through its
# helper `.stream()`.
#
# Expected: the two ways in which the client reads one and the same stream of chunks give the same
#           text.
# Happens:  `create(stream=True)` returns chunks that lack "object" or the choice's "index", text
#           and all. Without "object" the helper `.stream()` drops every chunk in silence: no event,
#           no error, no text; only whoever goes on to ask for the final completion sees an
#           AssertionError, which names no field. Without "index" it stops with a TypeError about
#           list indices. "id" and "created" may be left out in both.
# Matters:  whoever serves personal models under an address of their own writes these chunks by
#           hand, tests with the first way, and gives silence to applications that use the second.
#           Send every field; test both ways.
#
# Seen 2026-11 with openai 3.57.0:
#   without nothing  create 'Bonjour'  helper 'Bonjour', then 'Bonjour'
#   without object   create 'Bonjour'  helper '', then 'AssertionError'
#   without index    create 'Bonjour'  helper 'TypeError'
#   without id       create 'Bonjour'  helper 'Bonjour', then 'Bonjour'
#   without created  create 'Bonjour'  helper 'Bonjour', then 'Bonjour'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check openai==3.57.0
cd "$folder"
venv/bin/python - <<'PY'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai


def chunk(text, finish, without):
    """Return one chunk of an answer; the field named by `without` is left out."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    whole = {
        "id": "answer-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "personal",
        "choices": [choice],
    }
    whole.pop(without, None)
    choice.pop(without, None)
    return whole


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text, finish in (("Bon", None), ("jour", None), ("", "stop")):
            line = json.dumps(chunk(text, finish, without=request["model"]))
            self.wfile.write(f"data: {line}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(
    base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0
)
messages = [{"role": "user", "content": "Say hello in French."}]


def plain(without):
    """Return the text that create(stream=True) gives."""
    parts = client.chat.completions.create(model=without, messages=messages, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts)


def helper(without):
    """Return the text of the helper's events and of its final completion, or errors instead."""
    with client.chat.completions.stream(model=without, messages=messages) as stream:
        try:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
        except Exception as error:
            return (type(error).__name__,)
        try:
            return text, stream.get_final_completion().choices[0].message.content
        except Exception as error:
            return text, type(error).__name__


print("openai", openai.__version__)
text = "Bonjour"
expected = {
    "nothing": (text, text),
    "object": ("", "AssertionError"),
    "index": ("TypeError",),
    "id": (text, text),
    "created": (text, text),
}
changed = False
for without, wanted in expected.items():
    created, streamed = plain(without), helper(without)
    print(f"without {without:8} create {created!r}  helper {', then '.join(map(repr, streamed))}")
    changed |= created != text or streamed != wanted
server.shutdown()
sys.exit("openai behaves otherwise now" if changed else 0)
PY
