"""The programs of the matrix: how each server is run, which client calls it, and by which ways."""

import pwd
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from tests.lab.istiod.sent import HTTP, SERVER_FIRST, TCP
from tests.lab.pod import APP_ID
from tests.matrix import building

DEBIANS = "/usr/bin/python3"  # sees Debian's packages of the clients' libraries


class Way(Enum):
    """What connections pass between the two Envoys, by the port that is called."""

    MTLS = TCP  # a Service's TCP port: the inbound listener looks for TLS, tcp_proxy over mTLS
    PLAIN = 7000  # a port of no Service: the inbound listener looks for TLS, then for HTTP, in bytes as they came
    FIRST = SERVER_FIRST  # a port without inspectors and mTLS, as servers that speak first need it
    HTTP = HTTP  # HTTP connection managers on both sides, mTLS, pooled connections
    HTTP2 = 8083  # the same for a port that is named grpc: HTTP/2 all the way

    @property
    def is_mutual(self) -> bool:
        """Whether the proxies speak mTLS."""
        return self in (Way.MTLS, Way.HTTP, Way.HTTP2)

    @property
    def label(self) -> str:
        """As it is shown and chosen."""
        return self.name.lower()


@dataclass(frozen=True)
class Place:
    """Where a server runs: its port, its own directory, and the directory with everybody's programs."""

    port: int
    directory: Path
    programs: Path
    greets: bool

    @property
    def mirrors(self) -> Path:
        """The mirrors that need not be compiled."""
        return self.programs / "tests" / "matrix" / "mirrors"

    @property
    def greeting(self) -> list[str]:
        """For mirrors: whether they speak first."""
        return ["greets"] if self.greets else []


@dataclass(frozen=True)
class Command:
    """A program's command line, its user, and what is run before it and when it listens, as the same user."""

    argv: Sequence[str | Path]
    user: str | int = APP_ID
    before: Sequence[str | Path] = ()
    ready: Sequence[str | Path] = ()
    env: dict[str, str] = field(default_factory=dict)

    @property
    def uid(self) -> int:
        """The user's number."""
        return self.user if isinstance(self.user, int) else pwd.getpwnam(self.user).pw_uid


@dataclass(frozen=True)
class Notice:
    """What a program notices at `full`, as a row of docs/acceleration.md's table has it."""

    row: str  # how it begins
    always: bool  # whether a program of this kind cannot come through all calls


@dataclass(frozen=True)
class Client:
    """A program that calls a server: HOST PORT SEED SIZE, and options, are added to its command line.

    It prints {"bytes": N}, how many it has compared, and ends with an AssertionError if some are wrong.
    """

    argv: Callable[[Path], list[str | Path]]  # by the directory of everybody's programs
    user: int = APP_ID
    knows_greetings: bool = False  # whether a mirror that speaks first is to be told of by the option `greeted`


@dataclass(frozen=True)
class Software:
    """A server and its client."""

    name: str
    server: Callable[[Place], Command]
    client: Client
    ways: tuple[Way, ...]
    options: tuple[str, ...] = ()  # of the client
    compiled: tuple[str, ...] = ()  # see building.py
    at_full: Notice | None = None


def _postgres(place: Place) -> Command:
    (binaries,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
    data = place.directory / "data"
    how = ["--auth=trust", "--username=matrix", "--no-sync", "--encoding=UTF8", "--locale=C"]
    allowed = place.directory / "pg_hba.conf"
    allowed.write_text("local all all trust\nhost all all 127.0.0.6/32 trust\n")  # the address that proxies call from
    where: list[str | Path] = ["-p", str(place.port), "-h", "0.0.0.0", "-k", place.directory]
    argv: list[str | Path] = [binaries / "postgres", "-D", data, *where, "-F", "-c", f"hba_file={allowed}"]
    ready: list[str | Path] = [binaries / "pg_isready", "-h", place.directory, "-p", str(place.port)]
    return Command(argv, "postgres", [binaries / "initdb", "-D", data, *how], ready)


def _mariadb(place: Place) -> Command:
    data = place.directory / "data"
    made = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db"]
    here = [f"--datadir={data}", f"--socket={place.directory}/socket", f"--port={place.port}", "--bind-address=0.0.0.0"]
    limits = ["--max-allowed-packet=64M", "--skip-grant-tables", "--skip-name-resolve"]
    return Command(["mariadbd", "--no-defaults", *here, *limits], "mysql", made)


def _redis(place: Place) -> Command:
    here = ["--port", str(place.port), "--bind", "0.0.0.0", "--dir", str(place.directory)]
    return Command(["redis-server", *here, "--protected-mode", "no", "--save", ""], "redis")


def _nats(place: Place) -> Command:
    return Command(["nats-server", "-a", "0.0.0.0", "-p", str(place.port)], "nats")


def _rabbitmq(place: Place) -> Command:
    own = str(place.directory)
    config = place.directory / "rabbitmq.conf"
    config.write_text("loopback_users = none\n")
    env = {
        "HOME": own,  # Erlang keeps its cookie there
        "RABBITMQ_NODENAME": "matrix@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "0.0.0.0",
        "RABBITMQ_NODE_PORT": str(place.port),
        "RABBITMQ_MNESIA_BASE": own,
        "RABBITMQ_LOG_BASE": own,
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{own}/plugins",
        "RABBITMQ_CONFIG_FILE": str(config),
        "RABBITMQ_CONF_ENV_FILE": f"{own}/none",
        "RABBITMQ_PID_FILE": f"{own}/pid",
        "LANG": "C.UTF-8",
    }
    return Command(["/usr/lib/rabbitmq/bin/rabbitmq-server"], "rabbitmq", env=env)


def _grpc(place: Place) -> Command:
    # as root: the checkout, whose interpreter has grpc, may be where others cannot go
    return Command([sys.executable, "-E", place.mirrors / "grpc_mirror.py", str(place.port)], 0)


def _granian(place: Place) -> Command:
    here = ["--host", "0.0.0.0", "--port", str(place.port), "--working-dir", str(place.programs)]
    return Command([building.PYTHON, "-m", "granian", "--interface", "asgi", *here, "tests.matrix.mirrors.asgi:app"], 0)


def _asyncio(place: Place) -> Command:
    return Command([DEBIANS, "-E", "-s", place.mirrors / "mirror.py", str(place.port), *place.greeting])


def _go(kind: str) -> Callable[[Place], Command]:
    return lambda place: Command([place.programs / "go", kind, str(place.port), *place.greeting])


def _java(kind: str) -> Callable[[Place], Command]:
    return lambda place: Command(
        ["java", "-cp", place.programs / "java", "Mirror", kind, str(place.port), *place.greeting]
    )


def _node(kind: str) -> Callable[[Place], Command]:
    return lambda place: Command(["node", place.mirrors / "mirror.js", kind, str(place.port), *place.greeting])


def _script(name: str, interpreter: str | Path = DEBIANS) -> Client:
    """A file of clients/. An interpreter of the checkout runs as root, as others may not be able to go there."""
    user = APP_ID if interpreter == DEBIANS else 0
    return Client(lambda programs: [interpreter, "-s", programs / "tests" / "matrix" / "clients" / name], user)


def _go_calls(programs: Path) -> list[str | Path]:
    return [programs / "go", "call"]


def _java_calls(programs: Path) -> list[str | Path]:
    named = "-Djdk.httpclient.allowRestrictedHeaders=host"
    return ["java", named, "-cp", programs / "java", "Calls"]


def _node_calls(programs: Path) -> list[str | Path]:
    return ["node", programs / "tests" / "matrix" / "clients" / "calls.js"]


def _tokio(place: Place) -> Command:
    return Command([place.programs / "tokio", str(place.port), *place.greeting])


def _with_certificate(server: Callable[[Place], Command]) -> Callable[[Place], Command]:
    """A mirror that speaks TLS itself, with the certificate that its directory has."""

    def secured(place: Place) -> Command:
        command = server(place)
        return Command([*command.argv, place.directory / "cert.pem", place.directory / "key.pem"])

    return secured


_MIRRORED = replace(_script("mirrored.py"), knows_greetings=True)
_OVER_HTTP = _script("over_http.py")
_TCP = (Way.MTLS, Way.PLAIN)
_ALL_TCP = (*_TCP, Way.FIRST)
_HTTP = (Way.HTTP, Way.PLAIN)
_SPLICE = Notice("`splice(2)` from the socket", always=True)
_SHORT_READ = Notice("a read that returns less than it could", always=False)

SOFTWARE = {
    each.name: each
    for each in (
        Software("postgres", _postgres, _script("on_postgres.py"), _TCP),
        Software("psql", _postgres, _script("by_psql.py"), _TCP),
        Software("mariadb", _mariadb, _script("on_mariadb.py"), (Way.FIRST,)),
        Software("redis", _redis, _script("on_redis.py"), _TCP),
        Software("nats", _nats, _script("on_nats.py", building.PYTHON), (Way.FIRST,)),
        Software("rabbitmq", _rabbitmq, _script("on_rabbitmq.py"), _TCP),
        Software("grpc", _grpc, _script("on_grpc.py", sys.executable), (Way.HTTP2, *_TCP)),
        Software("asyncio", _asyncio, _MIRRORED, _ALL_TCP),
        Software("go", _go("tcp"), _MIRRORED, _ALL_TCP, compiled=("go",)),
        Software("go-copy", _go("copy"), _MIRRORED, _TCP, compiled=("go",), at_full=_SPLICE),
        Software("java", _java("tcp"), _MIRRORED, _ALL_TCP, compiled=("java",)),
        Software("node", _node("tcp"), _MIRRORED, _ALL_TCP),
        Software("tokio", _tokio, _MIRRORED, _ALL_TCP, compiled=("tokio",), at_full=_SHORT_READ),
        Software("asyncio-tls", _with_certificate(_asyncio), _MIRRORED, _TCP, ("tls",)),
        Software("go-tls", _with_certificate(_go("tcp")), _MIRRORED, _TCP, ("tls",), compiled=("go",)),
        Software("node-tls", _with_certificate(_node("tcp")), _MIRRORED, _TCP, ("tls",)),
        Software("go-http", _go("http"), _OVER_HTTP, _HTTP, compiled=("go",)),
        Software("java-http", _java("http"), _OVER_HTTP, _HTTP, compiled=("java",)),
        Software("node-http", _node("http"), _OVER_HTTP, _HTTP),
        Software("granian-http", _granian, _OVER_HTTP, _HTTP, at_full=_SHORT_READ),
        Software("go-calls", _node("http"), Client(_go_calls), _HTTP, compiled=("go",)),
        Software("java-calls", _node("http"), Client(_java_calls), _HTTP, compiled=("java",)),
        Software("node-calls", _go("http"), Client(_node_calls), _HTTP, compiled=("go",)),
    )
}
