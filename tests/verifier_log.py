"""`python -m tests.verifier_log connect4`: what this kernel's verifier says of one program.

Of a program that it takes, that is how much it had to walk; of one that it refuses, the way to the instruction at
fault. With --steps it is every instruction of every path, and the registers before each: tens of megabytes.

The programs are compiled as an agent compiles them, with the extras that the kernel has (SIDESTEP_LACKING leaves some
out). Nothing is attached or pinned.
"""

import sys

import click

from bpf import compiler
from bpf.compiler import DEATH_SOURCES, SOURCES
from bpf.extras import combinations, lacking
from bpf.hooks import DEATH_HOOKS, HOOKS, ITERATOR_HOOK, MESSAGE_HOOK, Hook
from bpf.kernel import require_root
from bpf.offsets import TASKS, definitions

_LOG, _STEPS = 0x2, 0x10  # bcc's DEBUG_BPF and DEBUG_BPF_REGISTER_STATE (src/cc/bpf_module.h)
PROGRAMS = {hook.name: hook for hook in (*HOOKS, MESSAGE_HOOK, ITERATOR_HOOK, *DEATH_HOOKS)}


@click.command()
@click.argument("program", type=click.Choice(list(PROGRAMS)))
@click.option("--steps", is_flag=True, help="Every instruction of every path.")
def verifier_log(program: str, steps: bool) -> None:
    """Print the verifier's log of PROGRAM. When the kernel refuses the program, the exit status is 1."""
    hook = PROGRAMS[program]
    try:
        require_root()
        with compiler.unit(*_unit_of(hook)) as unit:
            unit.debug = _STEPS if steps else _LOG
            unit.load_func(hook.function, hook.program_type, None, hook.attach_type)
    except Exception as error:  # bcc raises nothing narrower; its own words are on standard error already
        sys.exit(f"verifier-log: {error or type(error).__name__}")


def _unit_of(hook: Hook) -> tuple[tuple[str, ...], str]:
    """The sources that have a program, and their macros."""
    if hook in DEATH_HOOKS:
        return DEATH_SOURCES, definitions(TASKS)
    return SOURCES, "".join(extra.macros() for extra in next(combinations(lacking())))


if __name__ == "__main__":
    verifier_log()
