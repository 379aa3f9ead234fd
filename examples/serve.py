"""Keep a model loaded and answer prompts: one per line of standard input, or over HTTP on this machine.

    python examples/serve.py MODEL                     # type a prompt, read its continuation, end with Ctrl-D
    python examples/serve.py MODEL --port 8000         # curl -d 'The king' http://127.0.0.1:8000

The fastest way that runs the model here is chosen once (native on the CPU, a CUDA graph on a GPU). Requests are
answered one after the other.
"""

import argparse
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

from quantkit_eval import generate_stream
from quantkit_eval.errors import EvalError

import quantkit
from quantkit import assets
from quantkit.models.headers import resolve_model
from quantkit.models.tokenizer import open_tokenizer
from quantkit.runtime import choose_runner

Answer = Callable[[str, Callable[[str], None]], None]
LONGEST = 1 << 20  # bytes of a prompt that are read


def answering(model: str, new_tokens: int) -> Answer:
    """A function that writes the continuation of a prompt piece by piece, as soon as each is known."""
    path = resolve_model(model, assets.default_model())
    runner = choose_runner(quantkit.load(path, device="auto"), new_tokens)
    tokenizer = open_tokenizer(path)

    def answer(prompt: str, write: Callable[[str], None]) -> None:
        try:
            generate_stream(runner.model, tokenizer, prompt, max_new_tokens=new_tokens, write=write)
        except EvalError as error:  # an empty prompt, or one that is too long: the next one may be right
            write(f"[{error}]")

    return answer


def serve_lines(answer: Answer) -> None:
    for line in sys.stdin:
        answer(line.rstrip("\n"), lambda piece: print(piece, end="", flush=True))
        print(flush=True)


def serve_http(answer: Answer, port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = min(int(self.headers.get("Content-Length") or 0), LONGEST)
            prompt = self.rfile.read(length).decode(errors="replace")
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            answer(prompt, lambda piece: self.wfile.write(piece.encode()))

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--port", type=int, help="answer over HTTP instead; 0 takes a free port")
    arguments = parser.parse_args()
    answer = answering(arguments.model, arguments.new_tokens)
    if arguments.port is None:
        serve_lines(answer)
    else:
        serve_http(answer, arguments.port)


if __name__ == "__main__":
    main()
