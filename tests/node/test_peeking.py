"""Envoy's inspectors peek at a connection's first bytes. They find what the bytes are, however these come."""

import json
from typing import Any

import pytest

from bpf.layout import LEVELS
from tests.lab.envoy import PROXY_ID
from tests.lab.istiod.sent import HTTP, TCP
from tests.lab.levels import redirected_bytes, set_level
from tests.lab.pod import APP_ID, Pod
from tests.node.conftest import Mesh

CONNECTIONS, PIECES = 100, 8
# Requests of all that Envoy may take for TCP without our doing: on a busy machine it does so with one connection of
# some hundred, without acceleration too
ENVOYS_OWN = 6

# Connections, one after another: a request in eight writes, with the pauses that make them eight messages, and then a
# second request in one; inside TLS if there is a directory with a certificate: the ClientHello is what comes in pieces
# then. Prints the answers' bodies, or what has gone wrong instead.
CLIENT = """
import json, socket, ssl, sys, time
host, port, count, pieces, identity = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]

def send_in_pieces(connection, data):
    size = -(-len(data) // pieces)
    for at in range(0, len(data), size):
        connection.sendall(data[at:at + size])
        time.sleep(0.001)

class Plain:
    def __init__(self, connection):
        self.connection = connection
        self.first = True
    def send(self, data):
        send_in_pieces(self.connection, data) if self.first else self.connection.sendall(data)
        self.first = False
    def receive(self):
        return self.connection.recv(65536)

class Secured:
    def __init__(self, connection):
        self.connection, self.coming, self.going = connection, ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(f"{identity}/cert.pem", f"{identity}/key.pem")
        context.set_alpn_protocols(["istio-http/1.1", "istio"])
        self.tls = context.wrap_bio(self.coming, self.going)
        self.flush = lambda data: send_in_pieces(connection, data)
        self.until_done(self.tls.do_handshake)
    def until_done(self, step, *arguments):
        while True:
            try:
                return step(*arguments)
            except ssl.SSLWantReadError:
                if data := self.going.read():
                    self.flush(data)
                    self.flush = self.connection.sendall
                self.coming.write(self.connection.recv(65536))
    def send(self, data):
        self.until_done(self.tls.write, data)
        self.flush(self.going.read())
    def receive(self):
        return self.until_done(self.tls.read, 65536)

def ask(channel):
    path = b"/" + b"long" * 60  # its line is in all the pieces
    channel.send(b"GET " + path + b" HTTP/1.1\\r\\nHost: server\\r\\n\\r\\n")
    got = b""
    while b"\\r\\n\\r\\n" not in got:
        got += channel.receive() or sys.exit("the end, after %r" % got)
    head, _, body = got.partition(b"\\r\\n\\r\\n")
    size = int(next(line for line in head.lower().split(b"\\r\\n") if line.startswith(b"content-length:"))[15:])
    while len(body) < size:
        body += channel.receive()
    return json.loads(body)

answers = []
for _ in range(count):
    with socket.create_connection((host, port), timeout=3) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            channel = Secured(connection) if identity else Plain(connection)
            answers += [ask(channel), ask(channel)]
        except OSError as error:
            answers.append(repr(error))
            if len(answers) > 3 and all(isinstance(each, str) for each in answers[-3:]):
                break  # it won't get better
print(json.dumps(answers))
"""


def answers(pod: Pod, host: object, port: int, uid: int, identity: object = "") -> list[Any]:
    argv = ["/usr/bin/python3", "-I", "-c", CLIENT, host, port, CONNECTIONS, PIECES, identity]
    process = pod.popen([str(each) for each in argv], uid, stdout=-1, text=True)
    found: list[Any] = json.loads(process.communicate(timeout=60)[0])
    return found


def assert_all_answered(found: list[Any], by: Pod) -> None:
    names = [each["pod"] if isinstance(each, dict) else each for each in found]
    assert names == [by.name] * (2 * CONNECTIONS), [each for each in names if each != by.name][:3]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("port", [HTTP, TCP])
def test_plain_bytes_that_reach_the_inspectors_in_pieces(fast_mesh: Mesh, level: str, port: int) -> None:
    """The client is a proxy of another kind, without TLS: what it sends is what the other proxy's inspectors get."""
    set_level(fast_mesh.node, level)
    before = redirected_bytes(fast_mesh.alpha)
    assert_all_answered(answers(fast_mesh.alpha, fast_mesh.beta.ip4, port, PROXY_ID), fast_mesh.beta)
    assert (redirected_bytes(fast_mesh.alpha) > before) == (level != "off")


@pytest.mark.parametrize("level", LEVELS)
def test_a_client_hello_in_pieces(fast_mesh: Mesh, level: str) -> None:
    set_level(fast_mesh.node, level)
    before = redirected_bytes(fast_mesh.alpha)
    alpha = fast_mesh.alpha
    found = answers(alpha, fast_mesh.beta.ip4, HTTP, PROXY_ID, alpha.directory)
    assert_all_answered(found, fast_mesh.beta)
    assert all("/sa/alpha" in each["identities"] for each in found)
    assert (redirected_bytes(alpha) > before) == (level != "off")


@pytest.mark.parametrize("level", LEVELS)
def test_an_applications_request_in_pieces_is_taken_for_http_and_leaves_by_mtls(fast_mesh: Mesh, level: str) -> None:
    set_level(fast_mesh.node, level)
    fast_mesh.alpha.envoy.stop()
    fast_mesh.alpha.envoy.start()  # its connections to the other proxy, which it keeps, are of an earlier level
    before = redirected_bytes(fast_mesh.alpha)
    found = answers(fast_mesh.alpha, fast_mesh.beta.ip4, HTTP, APP_ID)
    assert_all_answered(found, fast_mesh.beta)
    assert sum("/sa/alpha" not in each["identities"] for each in found) <= ENVOYS_OWN
    assert (redirected_bytes(fast_mesh.alpha) > before) == (level != "off")
