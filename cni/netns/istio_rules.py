"""Istio's own netfilter rules in a pod's namespace: what they are, taking them away, and putting them back.

The tools of iptables and nftables do it, so that what is put back is what was there, match by match. All functions work
in the calling thread's network namespace.

Taking away ends no connection. What the rules have redirected is translated packet by packet as long as it is open. For
this the kernel needs the base chains of the table nat, and it tracks connections only while some rule wants it. So the
base chains stay, and a chain to which nothing leads has such a rule.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bpf.layout import OUTBOUND_PORT, RESOLVER_PORT
from cni.errors import RulesNotChanged

_OWN = "ISTIO_"  # what the names of Istio's chains begin with, in tables of iptables
_TRACKING = "SIDESTEP_TRACKING"  # our chain in the table nat: its rule is for no packet, and keeps conntrack at work
_OWN_TABLE = re.compile(r"istio-proxy")  # and its tables where it uses nftables itself
_TARGET = re.compile(r"(?:^| )-[jg] (\S+)")
_SECONDS = 20.0
_LOCK_SECONDS = 5  # that iptables-legacy waits for others on the node


class Tool(StrEnum):
    """What rules were written with. Of iptables, each family has its own."""

    IPTABLES_NFT = "iptables-nft"
    IP6TABLES_NFT = "ip6tables-nft"
    IPTABLES_LEGACY = "iptables-legacy"
    IP6TABLES_LEGACY = "ip6tables-legacy"
    NFT = "nft"


class RuleSet(BaseModel):
    """The rules that one tool has shown, as it shows them. Rules of others may be among them."""

    model_config = ConfigDict(frozen=True)

    tool: Tool
    text: str

    @property
    def is_tproxy(self) -> bool:
        """Whether the proxy gets inbound connections by TPROXY, whose open connections need the rules' marks."""
        return "TPROXY" in self.text


def istios_rules() -> list[RuleSet]:
    """The rule sets with rules of Istio's. Raises RulesNotChanged if a tool is missing or fails."""
    return [each for each in map(_shown, Tool) if each.text]


def take_away(rule_sets: list[RuleSet], lock: Path) -> None:
    """Take Istio's rules out of these rule sets. Others stay. Raises RulesNotChanged.

    `lock` is the file that iptables-legacy locks meanwhile. A tool changes a table as a whole or not at all.
    """
    for each in rule_sets:
        if each.tool is Tool.NFT:
            _run(["nft", "-f", "-"], _nft_removal(objects := _nft_objects()) + _nft_tracking(objects))
        else:
            _restore(each.tool, removal(each.text), lock)


def put_back(rule_sets: list[RuleSet], lock: Path) -> None:
    """Put Istio's rules of these rule sets back where they were. What is there of them already goes first.

    Raises RulesNotChanged.
    """
    for each in rule_sets:
        if each.tool is Tool.NFT:
            _run(["nft", "-f", "-"], _nft_removal(_nft_objects()) + each.text)
            continue
        now = _saved(each.tool)
        if _OWN in now:
            _restore(each.tool, removal(now), lock)
            now = _saved(each.tool)
        _restore(each.tool, restoration(each.text, now), lock)


def forget_answered_queries() -> None:
    """Have conntrack forget the DNS queries that the rules have redirected and that are answered.

    An entry outlives its query by half a minute. If another socket gets the same port meanwhile, and sidestep captures
    its query, the answer would be taken for one to the earlier query, and lost. Raises RulesNotChanged.
    """
    for family in ("ipv4", "ipv6"):
        chosen = ["-p", "udp", "--reply-port-src", str(RESOLVER_PORT), "-u", "SEEN_REPLY"]
        _run(["conntrack", "-D", "-f", family, *chosen], is_good=(0, 1))  # 1: there are none


def removal(saved: str) -> str:
    """What iptables-restore --noflush takes to remove Istio's rules and chains. `saved` is from iptables-save.

    Connections that are translated stay so.
    """
    tables = []
    for table, lines in _tables(saved):
        chains = [name for name in map(_declared, lines) if name.startswith(_OWN)]
        jumps = [line.replace("-A ", "-D ", 1) for line in lines if _is_jump(line)]
        tracking = [f":{_TRACKING} - [0:0]", f"-A {_TRACKING} -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}"]
        if chains or jumps:
            ends = [f"-{letter} {name}" for letter in "FX" for name in chains]
            tables.append([f"*{table}", *(tracking if table == "nat" else ()), *jumps, *ends])
    return _text(tables)


def restoration(saved: str, now: str) -> str:
    """What iptables-restore --noflush takes to put Istio's rules back where they were in `saved`.

    `now` is from iptables-save too, and has none of them.
    """
    lengths = {(table, chain): length for table, lines in _tables(now) for chain, length in _lengths(lines).items()}
    tables = []
    for table, lines in _tables(saved):
        chains = [f":{name} - [0:0]" for name in map(_declared, lines) if name.startswith(_OWN)]
        own = [line for line in lines if line.startswith(f"-A {_OWN}")]
        jumps, places = [], dict.fromkeys(_lengths(lines), 0)
        for line in (each for each in lines if each.startswith("-A ") and not each.startswith(f"-A {_OWN}")):
            _, chain, rest = line.split(" ", 2)
            places[chain] += 1
            if _is_jump(line):
                have = lengths.get((table, chain), 0)
                jumps.append(f"-I {chain} {min(places[chain], have + 1)} {rest}")
                lengths[table, chain] = have + 1
        ends = [f"-F {_TRACKING}", f"-X {_TRACKING}"] if (table, _TRACKING) in lengths else []
        if chains or jumps:
            tables.append([f"*{table}", *chains, *own, *jumps, *ends])
    return _text(tables)


def _tables(saved: str) -> Iterator[tuple[str, list[str]]]:
    """Each table with its lines."""
    table, lines = "", list[str]()
    for line in map(str.strip, saved.splitlines()):
        if line.startswith("*"):
            table, lines = line[1:].strip(), []
        elif line == "COMMIT":
            yield table, lines
        elif line and not line.startswith("#"):
            lines.append(line)


def _declared(line: str) -> str:
    """The chain that a line declares; "" if it is none that does."""
    return line[1:].split()[0] if line.startswith(":") else ""


def _lengths(lines: list[str]) -> dict[str, int]:
    """How many rules each chain has."""
    lengths = {name: 0 for name in map(_declared, lines) if name}
    for line in lines:
        if line.startswith("-A "):
            chain = line.split(" ", 2)[1]
            lengths[chain] = lengths.get(chain, 0) + 1
    return lengths


def _is_jump(line: str) -> bool:
    """Whether a rule in a chain of somebody else's leads to one of Istio's."""
    target = _TARGET.search(line)
    is_istios = bool(target and target[1].startswith(_OWN))
    return line.startswith("-A ") and not line.startswith(f"-A {_OWN}") and is_istios


def _text(tables: list[list[str]]) -> str:
    return "".join("\n".join([*lines, "COMMIT", ""]) for lines in tables)


def _shown(tool: Tool) -> RuleSet:
    if tool is not Tool.NFT:
        saved = _saved(tool)
        return RuleSet(tool=tool, text=saved if _OWN in saved else "")
    tables = [each["table"] for each in _nft_objects() if "table" in each]
    texts = [_run(["nft", "-s", "-n", "list", "table", each["family"], each["name"]]) for each in tables]
    return RuleSet(tool=tool, text="".join(texts))


def _saved(tool: Tool) -> str:
    return _run([f"{tool}-save"])


def _restore(tool: Tool, text: str, lock: Path) -> None:
    wait = [f"--wait={_LOCK_SECONDS}"] if "legacy" in tool else []
    _run([f"{tool}-restore", "--noflush", *wait], text, {"XTABLES_LOCKFILE": str(lock)})


def _nft_objects() -> list[dict[str, Any]]:
    """Istio's own tables as nft shows them, and what is in them."""
    shown = json.loads(_run(["nft", "-j", "list", "ruleset"]))["nftables"]
    return [
        each
        for each in shown
        for kind, found in each.items()
        if _OWN_TABLE.match(found.get("name" if kind == "table" else "table", ""))
    ]


def _nft_removal(objects: list[dict[str, Any]]) -> str:
    """What nft -f takes to empty Istio's tables, and to delete those that no open connection needs.

    Our chain goes with the others, where it is there already.
    """
    lines = []
    chains = [each["chain"] for each in objects if "chain" in each]
    for table in (each["table"] for each in objects if "table" in each):
        name = f"{table['family']} {table['name']}"
        inside = [each for each in chains if (each["family"], each["table"]) == (table["family"], table["name"])]
        lines.append(f"flush table {name}")
        if any(map(_translates, ({"chain": each} for each in inside))):
            lines += [f"delete chain {name} {each['name']}" for each in inside if "hook" not in each]
        else:
            lines.append(f"delete table {name}")
    return "".join(f"{line}\n" for line in lines)


def _nft_tracking(objects: list[dict[str, Any]]) -> str:
    """What nft -f takes to keep conntrack at work in the tables that translate."""
    tables = {(each["chain"]["family"], each["chain"]["table"]) for each in objects if _translates(each)}
    chain = _TRACKING.lower()
    return "".join(
        f"add chain {family} {table} {chain}\nadd rule {family} {table} {chain} meta l4proto tcp redirect to "
        f":{OUTBOUND_PORT}\n"
        for family, table in sorted(tables)
    )


def _translates(each: dict[str, Any]) -> bool:
    """Whether an object of nft's is a base chain of a table that translates."""
    return bool(each.get("chain", {}).get("type") == "nat")


def _run(
    command: list[str], text: str = "", environment: dict[str, str] | None = None, is_good: tuple[int, ...] = (0,)
) -> str:
    """Run a tool; returns what it prints. Raises RulesNotChanged."""
    path = shutil.which(command[0])
    if path is None:
        raise RulesNotChanged(f"there is no {command[0]} here; install the packages iptables, nftables and conntrack")
    try:
        done = subprocess.run(
            [path, *command[1:]], input=text, env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RulesNotChanged(f"{' '.join(command)} did not end within {_SECONDS:g} s") from None
    if done.returncode not in is_good:
        raise RulesNotChanged(f"{' '.join(command)} fails: {done.stderr.strip() or done.returncode}")
    return done.stdout
