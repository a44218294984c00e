"""Istio's rule sets, as its CNI plugin would load them into a pod: the oracle that sidestep is compared with.

Written from what the rules do and in what order (docs/semantics.md), for iptables-restore and ip6tables-restore.
"""

from cni.policy.annotations import CapturePolicy

TUNNEL, OUTBOUND, INBOUND, RESOLVER = 15008, 15001, 15006, 15053


class Tables:
    """Rules by table, in order; chains are declared as they come up."""

    def __init__(self) -> None:
        self._rules: dict[str, list[str]] = {}
        self._chains: dict[str, list[str]] = {}

    def add(self, table: str, chain: str, rule: str) -> None:
        """Append one rule."""
        for name in (chain, rule.rpartition("-j ")[2].split()[0]):
            if name.startswith("ISTIO_"):
                self.declare(table, name)
        self._chains.setdefault(table, [])
        self._rules.setdefault(table, []).append(f"-A {chain} {rule}")

    def declare(self, table: str, chain: str) -> None:
        """Have a chain that may stay empty."""
        known = self._chains.setdefault(table, [])
        if chain not in known:
            known.append(chain)

    def first(self, table: str, chain: str, rules: list[str]) -> None:
        """Put rules before all others of a chain."""
        self._rules[table] = [f"-A {chain} {rule}" for rule in rules] + self._rules[table]

    def text(self) -> str:
        """What iptables-restore reads."""
        parts = []
        for table, rules in self._rules.items():
            chains = [f"-N {name}" for name in self._chains[table]]
            parts += [f"*{table}", *chains, *rules, "COMMIT", ""]
        return "\n".join(parts)


class _Family:
    """What differs between the two families."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.loopback, self.inbound = ("127.0.0.1/32", "127.0.0.6/32") if version == 4 else ("::1/128", "::6/128")


def restore_text(policy: CapturePolicy, version: int) -> str:
    """The rules of one family (4 or 6) for a pod with this policy."""
    tables, family = Tables(), _Family(version)
    tproxy = policy.mode == "TPROXY"
    for name in policy.exclude_interfaces:
        for table in ("nat", "mangle") if tproxy else ("nat",):
            tables.add(table, "PREROUTING", f"-i {name} -j RETURN")
            tables.add(table, "OUTPUT", f"-o {name} -j RETURN")
    if policy.invalid_drop:
        tables.add("mangle", "PREROUTING", "-m conntrack --ctstate INVALID -j ISTIO_DROP")
        tables.add("mangle", "ISTIO_DROP", "-j DROP")
    tables.add("nat", "ISTIO_REDIRECT", f"-p tcp -j REDIRECT --to-ports {OUTBOUND}")
    tables.add("nat", "ISTIO_IN_REDIRECT", f"-p tcp -j REDIRECT --to-ports {INBOUND}")
    _inbound(tables, policy, family)
    _outbound(tables, policy, family)
    if tproxy:
        _proxys_own(tables, policy, family)
    return tables.text()


def _inbound(tables: Tables, policy: CapturePolicy, family: _Family) -> None:
    tproxy = policy.mode == "TPROXY"
    tables.add("nat", "ISTIO_INBOUND", f"-p tcp --dport {TUNNEL} -j RETURN")
    if not policy.inbound_all and not policy.include_inbound_ports:
        return
    table, capture = ("mangle", "ISTIO_TPROXY") if tproxy else ("nat", "ISTIO_IN_REDIRECT")
    if tproxy:
        tables.add("mangle", "ISTIO_DIVERT", "-j MARK --set-mark 1337")
        tables.add("mangle", "ISTIO_DIVERT", "-j ACCEPT")
        target = f"TPROXY --tproxy-mark 1337/0xffffffff --on-port {INBOUND}"
        tables.add("mangle", "ISTIO_TPROXY", f"! -d {family.loopback} -p tcp -j {target}")
    tables.add(table, "PREROUTING", "-p tcp -j ISTIO_INBOUND")
    for port in sorted(policy.exclude_inbound_ports) if policy.inbound_all else ():
        tables.add(table, "ISTIO_INBOUND", f"-p tcp --dport {port} -j RETURN")
    for match in [""] if policy.inbound_all else [f" --dport {port}" for port in sorted(policy.include_inbound_ports)]:
        if tproxy:
            established = "-m conntrack --ctstate RELATED,ESTABLISHED"
            tables.add(table, "ISTIO_INBOUND", f"-p tcp{match} {established} -j ISTIO_DIVERT")
        tables.add(table, "ISTIO_INBOUND", f"-p tcp{match} -j {capture}")


def _outbound(tables: Tables, policy: CapturePolicy, family: _Family) -> None:
    def rule(text: str) -> None:
        tables.add("nat", "ISTIO_OUTPUT", text)

    tables.add("nat", "OUTPUT", "-j ISTIO_OUTPUT")
    for port in sorted(policy.exclude_outbound_ports):
        for protocol in ("tcp", "udp"):
            rule(f"-p {protocol} --dport {port} -j RETURN")
    rule(f"-o lo -s {family.inbound} -j RETURN")
    to_app = "-p tcp ! --dport 53 " if policy.dns_capture else ""
    except_tunnel = f"! --dport {TUNNEL}"
    except_dns = f"-m multiport ! --dports 53,{TUNNEL}" if policy.dns_capture else except_tunnel
    for owner, ports in (
        (f"--uid-owner {policy.proxy_uid}", except_dns),
        (f"--gid-owner {policy.proxy_gid}", except_tunnel),
    ):
        rule(f"-o lo ! -d {family.loopback} -p tcp {ports} -m owner {owner} -j ISTIO_IN_REDIRECT")
        if not policy.loopback_included:
            rule(f"-o lo {to_app}-m owner ! {owner} -j RETURN")
        rule(f"-m owner {owner} -j RETURN")
    if policy.dns_capture:
        rule("-j ISTIO_OUTPUT_DNS")
        _dns(tables, policy)
    rule(f"-d {family.loopback} -j RETURN")
    for network in policy.exclude_outbound:
        if network.version == family.version:
            rule(f"-d {network} -j RETURN")
    for port in sorted(policy.include_outbound_ports):
        rule(f"-p tcp --dport {port} -j ISTIO_REDIRECT")
    if policy.outbound_all:
        rule("-j ISTIO_REDIRECT")
    for network in policy.include_outbound:
        if network.version == family.version:
            rule(f"-d {network} -j ISTIO_REDIRECT")


def _dns(tables: Tables, policy: CapturePolicy) -> None:
    """All of port 53 to the agent, and conntrack zones so that its own queries do not collide with the pod's."""
    for protocol in ("tcp", "udp"):
        tables.add("nat", "ISTIO_OUTPUT_DNS", f"-p {protocol} --dport 53 -j REDIRECT --to-ports {RESOLVER}")
    tables.add("raw", "OUTPUT", "-j ISTIO_OUTPUT_DNS")
    for owner in (f"--uid-owner {policy.proxy_uid}", f"--gid-owner {policy.proxy_gid}"):
        tables.add("raw", "ISTIO_OUTPUT_DNS", f"-p udp --dport 53 -m owner {owner} -j CT --zone 1")
        tables.add("raw", "ISTIO_OUTPUT_DNS", f"-p udp --sport {RESOLVER} -m owner {owner} -j CT --zone 2")
    tables.add("raw", "PREROUTING", "-j ISTIO_INBOUND")
    tables.add("raw", "ISTIO_OUTPUT_DNS", "-p udp --dport 53 -j CT --zone 2")
    tables.add("raw", "ISTIO_INBOUND", "-p udp --sport 53 -j CT --zone 1")


def _proxys_own(tables: Tables, policy: CapturePolicy, family: _Family) -> None:
    """TPROXY mode: what the proxy sends to its own pod is told apart by marks."""
    tables.add("mangle", "PREROUTING", "-p tcp -m mark --mark 1337 -j CONNMARK --save-mark")
    tables.add("mangle", "OUTPUT", "-p tcp -o lo -m mark --mark 1337 -j RETURN")
    for owner in (f"--uid-owner {policy.proxy_uid}", f"--gid-owner {policy.proxy_gid}"):
        match = f"! -d {family.loopback} -p tcp -o lo -m owner {owner}"
        tables.add("mangle", "OUTPUT", f"{match} -j MARK --set-mark 1338")
    tables.add("mangle", "OUTPUT", "-p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark")
    if policy.inbound_all or policy.include_inbound_ports:
        tables.first(
            "mangle",
            "ISTIO_INBOUND",
            [
                "-p tcp -m mark --mark 1337 -j RETURN",
                f"-p tcp -s {family.inbound} -i lo -j RETURN",
                "-p tcp -i lo -m mark ! --mark 1338 -j RETURN",
            ],
        )
