"""HTTP/2 and gRPC from end to end: nghttp asks nginx, and a Python another one, over HTTP/2 alone."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.cluster.bed import NAMESPACE, Bed
from tests.cluster.checks import Check, soon
from tests.cluster.grpc_image import ECHO, GRPC, import_grpc_image
from tests.cluster.pods import PORT, PodName
from tests.lab.images import libraries, write_image

_HTTP2 = "sidestep.test/http2:1"
_PROGRAMS = ("nginx", "nghttp")
_CONFIGURATION = f"""
daemon off;
master_process off;
pid /tmp/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    server {{
        listen {PORT} http2;
        location / {{ return 200 "$server_protocol $remote_addr $http_x_forwarded_client_cert"; }}
    }}
}}
"""
_PROXY = "127.0.0.6"  # where a sidecar connects to its application from
HTTP2_CLIENT, HTTP2_SERVER, GRPC_CLIENT, GRPC_SERVER = (
    PodName(NAMESPACE, name) for name in ("http2-client", "http2-server", "grpc-client", "grpc-server")
)
_IDLE = ["sleep", "infinity"]


def checks(bed: Bed) -> Iterator[Check]:
    """By Service, where the proxies talk mTLS, and by Pod IP, across nodes."""
    folder = bed.cluster.directory / "protocols"
    folder.mkdir()
    bed.cluster.import_images([_http2_image(folder)])
    import_grpc_image(bed)
    made = {
        HTTP2_CLIENT: (_HTTP2, _IDLE),
        HTTP2_SERVER: (_HTTP2, ["nginx", "-c", "/etc/nginx.conf"]),
        GRPC_CLIENT: (GRPC, _IDLE),
        GRPC_SERVER: (GRPC, [*ECHO, "serve", str(PORT)]),
    }
    try:
        for pod, (image, command) in made.items():
            # as root nginx would look for its own user, in a file that isn't there
            container = {"name": "app", "image": image, "command": command, "securityContext": {"runAsUser": 1000}}
            # by this name istiod knows what the port speaks
            protocol, _, role = pod.name.partition("-")
            bed.pods.make(pod, bed.cluster.nodes[role == "server"].name, container, {protocol: PORT})
        bed.pods.wait_until_ready(*made)
        for speak, protocol, client, server in (
            (_wrong_over_http2, "HTTP/2", HTTP2_CLIENT, HTTP2_SERVER),
            (_wrong_over_grpc, "gRPC", GRPC_CLIENT, GRPC_SERVER),
        ):
            mutual = partial(speak, bed, server.host, f"URI={client.spiffe}")
            yield Check(f"{client} and {server} talk {protocol} and mTLS", soon(mutual))
            clear = partial(speak, bed, bed.pods.ip(server), "")
            yield Check(f"{client} and {server} talk {protocol} by Pod IP", soon(clear))
    finally:
        bed.pods.delete(*made)


def _wrong_over_http2(bed: Bed, host: str, identity: str) -> str:
    """What came instead of an answer over HTTP/2, from the application's proxy, that names `identity`."""
    told = bed.pods.run(HTTP2_CLIENT, "timeout", "10", "nghttp", f"http://{host}:{PORT}/")
    return "" if told.startswith(f"HTTP/2.0 {_PROXY} ") and identity in told else told


def _wrong_over_grpc(bed: Bed, host: str, identity: str) -> str:
    """The same of both messages of a stream."""
    told = bed.pods.run(GRPC_CLIENT, *ECHO, "ask", f"{host}:{PORT}")
    answers = [json.loads(line) for line in told.splitlines()]
    right = [each["number"] for each in answers if _PROXY in each["caller"] and identity in each["identities"]]
    return "" if right == [0, 1] else told


def _http2_image(folder: Path) -> Path:
    """With both programs and nginx's configuration."""
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION)
    found = [Path(path) for path in map(shutil.which, _PROGRAMS) if path]
    files = {f"bin/{path.name}": path for path in found} | {"etc/nginx.conf": configuration}
    for path in found:
        files |= libraries(path)
    archive = folder / "http2.tar"
    write_image(archive, _HTTP2, files, {"Env": ["PATH=/bin"]})
    return archive
