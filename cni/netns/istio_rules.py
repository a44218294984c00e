"""Istio's own netfilter rules in a pod's namespace: what they are, taking them away, and putting them back.

The tools of iptables and nftables do it, so that what is put back is what was there, match by match. All functions work
in the calling thread's network namespace.

Taking away ends no connection. What the rules have redirected is translated packet by packet as long as it is open. For
this the kernel needs the base chains of the table nat, and it tracks connections only while some rule wants it. So the
base chains stay, and a chain to which nothing leads has such a rule.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bpf.layout import OUTBOUND_PORT, RESOLVER_PORT
from cni.errors import RulesNotChanged
from cni.netns.netfilter import is_captured_by_istio

_OWN = "ISTIO_"  # what the names of Istio's chains begin with, in tables of iptables
_TRACKING = "SIDESTEP_TRACKING"  # our chain in the table nat: its rule is for no packet, and keeps conntrack at work
_OWN_TABLE = re.compile(r"istio-proxy")  # the names of Istio's tables begin so where it uses nftables itself
# what only Istio's rules have: releases before 1.20 had some of them outside of chains of their own
_ISTIOS_ALONE = re.compile(r"--to-ports? (15001|15006|15053)\b|-j CT --zone|--on-port 15006")
# what iptables-save prints: tables, chains, rules and comments. Anything else comes out of a rule's comment.
_LINE = re.compile(r"[*:#]|-A |COMMIT$|$")
# iptables runs this option's argument as a program. Every beginning of it counts.
_PROGRAM = re.compile(r"-M|--mo(d|dp|dpr|dpro|dprob|dprobe)?(=|$)")
_SECONDS = 20.0
_LOCK_SECONDS = 5  # that iptables-legacy waits for others
_NONE_DELETED = "0 flow entries"  # what conntrack says when it exits with 1 and nothing is wrong


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
        return "tproxy" in self.text.lower()


def istios_rules() -> list[RuleSet]:
    """The rule sets with rules of Istio's. Raises RulesNotChanged if they can't all be told, or not be taken away."""
    found, problems = [], []
    for tool in Tool:
        try:
            shown = _shown(tool)
        except RulesNotChanged as error:  # a kernel may have one kind of rules only
            problems.append(str(error))
            continue
        if shown.text:
            _require_usual(shown)
            found.append(shown)
    if bool(found) != is_captured_by_istio():
        seen = "are not seen by the kernel's own list" if found else "are there, and no tool shows them"
        raise RulesNotChanged(f"rules of Istio's {seen}: {'; '.join(problems) or 'nobody says why'}")
    return found


def are_there(rule_sets: Iterable[RuleSet]) -> bool:
    """Whether all of Istio's rules in these rule sets are in the namespace now. Raises RulesNotChanged."""
    return all(_istios(each.tool, each.text) <= _istios(each.tool, _shown(each.tool).text) for each in rule_sets)


def take_away(rule_sets: Iterable[RuleSet], lock: Path) -> None:
    """Take Istio's rules out of these rule sets. Others stay. Raises RulesNotChanged, also if some are left.

    `lock` is the file that iptables-legacy locks meanwhile. A tool changes a table as a whole or not at all.
    """
    for each in rule_sets:
        if each.tool is Tool.NFT:
            _run(["nft", "-f", "-"], _nft_removal(objects := _nft_objects()) + _nft_tracking(objects))
        else:
            _restore(each.tool, removal(_saved(each.tool)), lock)
    if istios_rules():
        raise RulesNotChanged("rules of Istio's are still there after their removal")


def put_back(rule_sets: Iterable[RuleSet], lock: Path) -> None:
    """Put Istio's rules of these rule sets back where they were. At no moment is a table without what it has of them.

    Raises RulesNotChanged, also if they are not there then.
    """
    wanted = list(rule_sets)
    for each in wanted:
        if are_there([each]):
            continue
        if each.tool is Tool.NFT:
            _run(["nft", "-f", "-"], _nft_removal(_nft_objects()) + each.text)
        else:
            _restore(each.tool, restoration(each.text, _saved(each.tool)), lock)
    if not are_there(wanted):
        raise RulesNotChanged("not all of Istio's rules are there after they were put back")


def forget_answered_queries() -> None:
    """Have conntrack forget the DNS queries that the rules have redirected and that are answered.

    An entry outlives its query by half a minute. If another socket gets the same port meanwhile, and sidestep captures
    its query, the answer would be taken for one to the earlier query, and lost. Raises RulesNotChanged.
    """
    _forget("-p", "udp", "--reply-port-src", str(RESOLVER_PORT), "-u", "SEEN_REPLY")


def forget_unanswered_connections() -> None:
    """Have conntrack forget the connections whose SYN has had no answer. The next SYN then meets the rules.

    Without it the rules would not be asked: conntrack has decided about the first SYN, before they were there. Raises
    RulesNotChanged.
    """
    _forget("-p", "tcp", "--state", "SYN_SENT")


def removal(now: str) -> str:
    """What iptables-restore --noflush takes to remove Istio's rules and chains. `now` is from iptables-save.

    Connections that are translated stay so. Raises RulesNotChanged.
    """
    tables = []
    for table, lines in _tables(now):
        chains = _chains(lines)
        jumps = [line.replace("-A ", "-D ", 1) for line in lines if _is_jump(line)]
        tracking = [f":{_TRACKING} - [0:0]", f"-A {_TRACKING} -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}"]
        if chains or jumps:
            ends = [f"-{letter} {name}" for letter in "FX" for name in chains]
            tables.append([f"*{table}", *(tracking if table == "nat" else ()), *jumps, *ends])
    return _text(tables)


def restoration(saved: str, now: str) -> str:
    """What iptables-restore --noflush takes to put Istio's rules back where they were in `saved`, in one step a table.

    `now` is from iptables-save too. What it has of them is replaced. Raises RulesNotChanged.
    """
    present = dict(_tables(now))
    tables = []
    for table, lines in _tables(saved):
        there = present.get(table, [])
        chains = _chains(lines)
        if not (chains or any(map(_is_jump, lines))):
            continue
        others = [line for line in there if not _is_jump(line)]
        drops = [line.replace("-A ", "-D ", 1) for line in there if _is_jump(line)]
        rules = [line for line in lines if line.startswith(f"-A {_OWN}")]
        gone = [name for name in (*_chains(there), *_chains(there, _TRACKING)) if name not in chains]
        ends = [f"-{letter} {name}" for letter in "FX" for name in gone]
        declared = [f":{name} - [0:0]" for name in chains]  # this empties those that are there
        tables.append([f"*{table}", *drops, *declared, *rules, *_insertions(lines, others), *ends])
    return _text(tables)


def _insertions(lines: list[str], others: list[str]) -> Iterator[str]:
    """The jumps to Istio's chains, each at its place among the rules of others, as far as these are there."""
    have, places = _lengths(others), dict.fromkeys(_lengths(lines), 0)
    for line in lines:
        if not line.startswith("-A ") or line.startswith(f"-A {_OWN}"):
            continue
        _, chain, rest = line.split(" ", 2)
        places[chain] += 1
        if _is_jump(line):
            yield f"-I {chain} {min(places[chain], have.get(chain, 0) + 1)} {rest}"
            have[chain] = have.get(chain, 0) + 1


def _tables(saved: str) -> Iterator[tuple[str, list[str]]]:
    """Each table with its lines. Raises RulesNotChanged if one is none of iptables-save's."""
    table, lines = "", list[str]()
    for line in map(str.strip, saved.splitlines()):
        if not _LINE.match(line):
            raise RulesNotChanged(f"iptables-save shows a line that is no rule, so nothing is changed: {line!r}")
        if line.startswith("*"):
            table, lines = line[1:].strip(), []
        elif line == "COMMIT":
            yield table, lines
        elif line and not line.startswith("#"):
            lines.append(line)


def _chains(lines: Iterable[str], prefix: str = _OWN) -> list[str]:
    """The chains of Istio's that are declared."""
    names = [line[1:].split()[0] for line in lines if line.startswith(":")]
    return [name for name in names if name.startswith(prefix)]


def _lengths(lines: Iterable[str]) -> dict[str, int]:
    """How many rules each chain has."""
    lengths: dict[str, int] = {}
    for line in lines:
        if line.startswith("-A "):
            chain = line.split(" ", 2)[1]
            lengths[chain] = lengths.get(chain, 0) + 1
    return lengths


def _is_jump(line: str) -> bool:
    """Whether a rule in a chain of somebody else's leads to one of Istio's."""
    if not line.startswith("-A ") or line.startswith(f"-A {_OWN}"):
        return False
    words = _words(line)
    return any(option in ("-j", "-g") and to.startswith(_OWN) for option, to in pairwise(words))


def _words(line: str) -> list[str]:
    """A rule's words, of which a comment is one. Raises RulesNotChanged if it can't be passed on to a tool."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RulesNotChanged(f"a rule can't be read, so nothing is changed: {line!r}: {error}") from None
    if any(map(_PROGRAM.match, words)):
        raise RulesNotChanged(f"a rule would have a program run, so nothing is changed: {line!r}")
    return words


def _require_usual(shown: RuleSet) -> None:
    """Raise RulesNotChanged if there are rules of Istio's that are not in its chains, or can't be passed on."""
    if shown.tool is Tool.NFT:
        return
    for _, lines in _tables(shown.text):
        for line in (each for each in lines if each.startswith("-A ")):
            _words(line)
            is_in_chain = line.startswith((f"-A {_OWN}", f"-A {_TRACKING}"))
            if _ISTIOS_ALONE.search(line) and not is_in_chain and not _is_jump(line):
                raise RulesNotChanged(f"a rule of Istio's is outside of its chains, as before Istio 1.20: {line!r}")


def _istios(tool: Tool, text: str) -> set[tuple[str, str]]:
    """Istio's rules and chains in a text, each with its table."""
    if tool is Tool.NFT:
        return {("", text)} if text else set()
    return {
        (table, line.split(" [")[0])
        for table, lines in _tables(text)
        for line in lines
        if line.startswith((f":{_OWN}", f"-A {_OWN}")) or _is_jump(line)
    }


def _text(tables: list[list[str]]) -> str:
    return "".join("\n".join([*lines, "COMMIT", ""]) for lines in tables)


def _shown(tool: Tool) -> RuleSet:
    """What a tool shows; empty without rules of Istio's."""
    if tool is not Tool.NFT:
        saved = _saved(tool)
        return RuleSet(tool=tool, text=saved if _istios(tool, saved) else "")
    objects = _nft_objects()
    if not any(_is_istios_chain(each) for each in objects):
        return RuleSet(tool=tool, text="")
    tables = [each["table"] for each in objects if "table" in each]
    texts = [_run(["nft", "-s", "-n", "list", "table", each["family"], each["name"]]) for each in tables]
    return RuleSet(tool=tool, text="".join(texts))


def _saved(tool: Tool) -> str:
    return _run([f"{tool}-save"])


def _restore(tool: Tool, text: str, lock: Path) -> None:
    wait = [f"--wait={_LOCK_SECONDS}"] if "legacy" in tool else []
    _run([f"{tool}-restore", "--noflush", *wait], text, {"XTABLES_LOCKFILE": str(lock)})


def _forget(*chosen: str) -> None:
    """Delete entries of conntrack, in both families."""
    for family in ("ipv4", "ipv6"):
        _run(["conntrack", "-D", "-f", family, *chosen], fine=_NONE_DELETED)


def _nft_objects() -> list[dict[str, Any]]:
    """Istio's own tables as nft shows them, and what is in them."""
    shown = json.loads(_run(["nft", "-j", "list", "ruleset"]))["nftables"]
    return [
        each
        for each in shown
        for kind, found in each.items()
        if _OWN_TABLE.match(found.get("name" if kind == "table" else "table", ""))
    ]


def _is_istios_chain(each: dict[str, Any]) -> bool:
    """Whether an object of nft's is a chain to which others lead, and not ours."""
    chain = each.get("chain", {})
    return bool(chain) and "hook" not in chain and chain["name"] != _TRACKING.lower()


def _translates(each: dict[str, Any]) -> bool:
    """Whether an object of nft's is a base chain of a table that translates."""
    return bool(each.get("chain", {}).get("type") == "nat")


def _nft_removal(objects: list[dict[str, Any]]) -> str:
    """What nft -f takes to empty Istio's tables, and to delete those that no open connection needs.

    Our chain goes with the others, where it is there already.
    """
    lines = []
    chains = [each for each in objects if "chain" in each]
    for table in (each["table"] for each in objects if "table" in each):
        name = f"{table['family']} {table['name']}"
        inside = [
            each
            for each in chains
            if (each["chain"]["family"], each["chain"]["table"]) == (table["family"], table["name"])
        ]
        lines.append(f"flush table {name}")
        if any(map(_translates, inside)):
            lines += [f"delete chain {name} {each['chain']['name']}" for each in inside if "hook" not in each["chain"]]
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


def _run(command: list[str], text: str = "", environment: dict[str, str] | None = None, fine: str = "") -> str:
    """Run a tool; returns what it prints. Raises RulesNotChanged, unless it fails with the words `fine`."""
    path = shutil.which(command[0])
    if path is None:
        raise RulesNotChanged(f"there is no {command[0]} here; install the packages iptables, nftables and conntrack")
    try:
        done = subprocess.run(
            [path, *command[1:]],
            input=text,
            env=environment,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RulesNotChanged(f"{' '.join(command)} did not end within {_SECONDS:g} s") from None
    except OSError as error:
        raise RulesNotChanged(f"{path} can't be run: {error.strerror}") from error
    if done.returncode and not (fine and fine in done.stderr):
        raise RulesNotChanged(f"{' '.join(command)} fails: {done.stderr.strip() or done.returncode}")
    return done.stdout
