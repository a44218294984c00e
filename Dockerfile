# sidestep: the agent, the plugin that it drops on the host, and all that both need.
#
# With a registry:     docker build -t sidestep .
# Without one:         make image   (buildah, from a base made by debootstrap)
#
# make image also passes VERSION, which is installer.VERSION, for the label.
ARG BASE=debian:12-slim

FROM ${BASE} AS shim
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends gcc libc6-dev libjansson-dev make
COPY cni/shim /src/cni/shim
RUN make -C /src/cni/shim
# what is linked into the plugin: Debian's records of it, where scanners of images look for them
RUN mkdir -p /src/status.d \
 && for package in libc6-dev libjansson-dev; do dpkg-query -s $package > /src/status.d/$package; done

FROM ${BASE} AS packages
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends python3-venv
COPY locks/run.txt /src/
RUN python3 -m venv --system-site-packages /opt/venv \
 && /opt/venv/bin/pip install -q --no-cache-dir --no-compile --require-hashes --only-binary :all: -r /src/run.txt \
 && /opt/venv/bin/pip uninstall -qy pip setuptools

FROM ${BASE}
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
      conntrack iptables libbpf1 nftables python3 python3-bpfcc util-linux \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /usr/share/doc /usr/share/man
COPY --from=packages /opt/venv /opt/venv
COPY --from=shim /src/build/sidestep-cni /opt/cni/bin/sidestep-cni
COPY --from=shim /src/status.d /var/lib/dpkg/status.d
COPY bpf /opt/sidestep/bpf
COPY cni /opt/sidestep/cni
COPY installer /opt/sidestep/installer
# the plugin's sources are in the stage that built it; the root is read-only later, so modules are compiled now
RUN rm -rf /opt/sidestep/cni/shim \
 && /opt/venv/bin/python -m compileall -q /opt/sidestep \
 && printf '#!/bin/sh\ncd /opt/sidestep && exec /opt/venv/bin/python -m installer "$@"\n' > /usr/local/bin/sidestep \
 && printf '#!/bin/sh\nexec /usr/local/bin/sidestep install-cni "$@"\n' > /usr/local/bin/install-cni \
 && chmod 755 /usr/local/bin/sidestep /usr/local/bin/install-cni
ARG VERSION
LABEL org.opencontainers.image.title="sidestep" \
      org.opencontainers.image.description="Istio sidecar traffic capture at the socket layer" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only" \
      org.opencontainers.image.version="$VERSION"
# loading programs and entering pods' namespaces takes root; what of it is in the DaemonSet's capabilities
USER 0:0
WORKDIR /opt/sidestep
ENV PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000 15014
HEALTHCHECK --interval=20s --timeout=5s --start-period=30s \
  CMD ["/opt/venv/bin/python", "-c", "import os, urllib.request; urllib.request.urlopen('http://localhost:%s/healthz' % (os.environ.get('SIDESTEP_HEALTH_PORT') or 8000), timeout=4)"]
ENTRYPOINT ["/usr/local/bin/sidestep"]
CMD ["agent"]
