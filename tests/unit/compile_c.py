"""Builds small C programs around the kernel half's pure headers, so that gcc can be asked what they say."""

import subprocess
from pathlib import Path

BPF = Path(__file__).parents[2] / "bpf"

PRELUDE = """
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define TABLE(kind, key_t, value_t, name, size, flags)
#define SOCKET_TABLE(key_t, value_t, name, size)
#define RING(name, bytes)
#define SOCKET_STORAGE(value_t, name)
#include "maps.h"
"""


def build(directory: Path, source: str, *flags: str) -> Path:
    """Compile `source` after the prelude; returns the program or library."""
    text, output = directory / "probe.c", directory / "probe"
    text.write_text(PRELUDE + source)
    subprocess.run(
        [
            "gcc",
            "-Wall",
            "-Werror",
            "-Wno-unused-function",
            *flags,
            "-I",
            str(BPF),
            str(text),
            "-o",
            str(output),
        ],
        check=True,
    )
    return output
