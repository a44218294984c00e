"""The run as a page: ratios, what this machine did, what was redirected, what failed."""

from tests.bench.mesh.markdown import absolutes, conditions, passed, ratios, wrong
from tests.bench.mesh.results import Results

_NOTES = """\
- Each cell is the median of the rounds, with the lowest and the highest in brackets. Ratios are made within a round:
  the pairs take turns at each workload, in an order that is drawn anew each time.
- Two nodes of a real Kubernetes, one istiod, its own injector, pilot-agent and mutual TLS. `iptables` is a pair of pods
  on the first node, whose rules Istio's own CNI plugin has written; nothing of sidestep is on that node. `off`, `proxy`
  and `full` are pairs on the second node, which is at level `full`; their Pods have the level as an annotation.
- The client asks for the server's Service by its address. HTTP goes through Envoy's HTTP connection managers, which
  keep connections to the server's Envoy open whatever the client does; tcp_proxy makes one for each of the client's.
- Envoys are those of PyPI, without Istio's own filters for metadata, statistics and ALPN. No access log.
- Clients, Envoys, servers, kernel, and all of Kubernetes share the machine's cores. CPU is the whole machine's time
  that was not idle, kubectl and the daemons included. CPU of the pods' cgroups is what the scheduler charged to the
  processes of both pods, load generator and proxies included.
"""


def page(results: Results) -> str:
    """All of it."""
    title = "# Two mesh pods on one node of a real mesh"
    parts = [title, conditions(results), *ratios(results), *absolutes(results), passed(results), wrong(results)]
    return "\n".join([*parts, "## How to read this\n", _NOTES])
