"""`network.failure` says in time whether a server answers, and if not, why."""

import http.server
import threading
import urllib.request

import pytest

from experiments import network


@pytest.fixture
def server():
    """A server that answers every request with 404."""
    server = http.server.HTTPServer(("127.0.0.1", 0), type("Silent", (http.server.BaseHTTPRequestHandler,), {
        "do_GET": lambda self: self.send_error(404),
        "log_message": lambda self, *args: None,
    }))  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_any_answer_is_one(server):
    assert network.failure(f"http://127.0.0.1:{server.server_port}") is None


def test_no_server_and_no_address(server):
    port = server.server_port
    server.shutdown()
    server.server_close()
    assert "refused" in network.failure(f"http://127.0.0.1:{port}")
    assert "unknown url type" in network.failure("nowhere")


def test_a_name_that_is_looked_up_for_too_long(monkeypatch):
    over = threading.Event()

    def look_up(address, timeout):
        over.wait(30)
        raise OSError("there is no such name")

    monkeypatch.setattr(network, "TIMEOUT", 0.01)
    monkeypatch.setattr(urllib.request, "urlopen", look_up)
    assert network.failure("http://slow") == "no answer within 0.01 s"
    over.set()
