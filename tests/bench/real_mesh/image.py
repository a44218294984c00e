"""The image of clients and servers: Debian's load generators and nginx, with what they want to find in FILES."""

from pathlib import Path

from tests.bench.mesh.commands import generator_files
from tests.bench.mesh.proxies import SERVICES
from tests.bench.mesh.servers import BODIES, listening, nginx_conf
from tests.lab.images import libraries, write_image

IMAGE = "sidestep.test/bench:1"
FILES = Path("/tmp")  # everybody may write there
# By nginx. A port for TCP is called by mTLS in any mesh.
SERVED = {name: each for name, each in SERVICES.items() if name in ("http", "http-h2", "tcp", "tcp-h2")}
_CONF = "nginx.conf"
_PROGRAMS = (Path("/usr/bin/wrk"), Path("/usr/bin/h2load"), Path("/usr/sbin/nginx"))
SERVE = ["nginx", "-p", str(FILES), "-c", str(FILES / _CONF), "-e", str(FILES / "nginx.log")]


def make_image(directory: Path) -> Path:
    """An archive of it, in a folder that is made in `directory`."""
    made = directory / "bench-image"
    made.mkdir()
    conf = nginx_conf(FILES, [listening(f"[::]:{each.port} ipv6only=off", each) for each in SERVED.values()])
    content = {**generator_files(), **{name: b"x" * size for name, size in BODIES.items()}, _CONF: conf.encode()}
    for name, of in content.items():
        (made / name).write_bytes(of)
    files = {str(FILES / name).lstrip("/"): made / name for name in content}
    for program in _PROGRAMS:
        files |= {f"bin/{program.name}": program, **libraries(program)}
    archive = made / "image.tar"
    write_image(archive, IMAGE, files, {"Cmd": ["/bin/sleep", "infinity"], "Env": ["PATH=/bin"]})
    return archive
