"""HTTP/2 from end to end: nghttp asks nginx, neither of which falls back to HTTP/1.1."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.cluster.bed import NAMESPACE, Bed
from tests.cluster.checks import Check, soon
from tests.cluster.pods import PORT, PodName
from tests.lab.images import libraries, write_image

_IMAGE = "sidestep.test/http2:1"
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
ASKING, ANSWERING = PodName(NAMESPACE, "http2-client"), PodName(NAMESPACE, "http2-server")
_PORTS = {"http2": PORT}  # by this name istiod knows what the port speaks


def checks(bed: Bed) -> Iterator[Check]:
    """By Service, where the proxies talk mTLS, and by Pod IP, across nodes."""
    bed.cluster.import_images([_make_image(bed.cluster.directory / "http2")])
    try:
        for pod, node, command in zip(
            (ASKING, ANSWERING),
            bed.cluster.nodes,
            (["sleep", "infinity"], ["nginx", "-c", "/etc/nginx.conf"]),
            strict=True,
        ):
            # as another user nginx would look for its own in a file that isn't there
            container = {"name": "app", "image": _IMAGE, "command": command, "securityContext": {"runAsUser": 1000}}
            bed.pods.make(pod, node.name, container, _PORTS)
        bed.pods.wait_until_ready(ASKING, ANSWERING)
        mutual = partial(_wrong, bed, ANSWERING.host, f"URI={ASKING.spiffe}")
        yield Check(f"{ASKING} and {ANSWERING} talk HTTP/2 and mTLS", soon(mutual))
        clear = partial(_wrong, bed, bed.pods.ip(ANSWERING), "HTTP/2.0 127.0.0.6")
        yield Check(f"{ASKING} and {ANSWERING} talk HTTP/2 by Pod IP", soon(clear))
    finally:
        bed.pods.delete(ASKING, ANSWERING)


def _wrong(bed: Bed, host: str, wanted: str) -> str:
    """What came instead of an answer over HTTP/2, from the application's proxy, that has `wanted` in it."""
    told = bed.pods.run(ASKING, "timeout", "10", "nghttp", f"http://{host}:{PORT}/")
    return "" if told.startswith("HTTP/2.0 127.0.0.6") and wanted in told else told


def _make_image(directory: Path) -> Path:
    """With both programs and nginx's configuration."""
    directory.mkdir()
    configuration = directory / "nginx.conf"
    configuration.write_text(_CONFIGURATION)
    found = [Path(path) for path in map(shutil.which, _PROGRAMS) if path]
    files = {f"bin/{path.name}": path for path in found} | {"etc/nginx.conf": configuration}
    for path in found:
        files |= libraries(path)
    archive = directory / "http2.tar"
    write_image(archive, _IMAGE, files, {"Env": ["PATH=/bin"]})
    return archive
