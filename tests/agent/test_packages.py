"""Debian's packages are installed without starting their services, and whoever may not install them is told which."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "packages"
OURS = "# of sidestep, while packages are installed"
# What apt-get finds while it installs; /usr/sbin is a directory of the test's own, in a mount namespace of its own.
APT = '#!/bin/sh\ncase "$1" in install) sh /usr/sbin/policy-rc.d; echo "$? $*" >> "$SEEN"; exit "${ENDS:-0}" ;; esac\n'


def install(directory: Path, policy: str | None, **environment: str) -> tuple[int, str, str | None]:
    """The exit status, what apt-get was asked for and found, and the policy that is there afterwards."""
    for name in ("sbin", "bin"):
        (directory / name).mkdir()
    apt, seen, place = directory / "bin" / "apt-get", directory / "seen", directory / "sbin" / "policy-rc.d"
    apt.write_text(APT)
    apt.chmod(0o755)
    seen.touch()
    if policy is not None:
        place.write_text(policy)
    script = f'mount --bind {directory}/sbin /usr/sbin && exec "$@"'
    argv: list[str | Path] = ["unshare", "-m", "sh", "-c", script, "sh", SCRIPT, "test", "dpkg", "no-such-package"]
    path = f"{directory}/bin:/usr/bin:/bin"
    env = {"PATH": path, "SEEN": str(seen), **environment}
    done = subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, seen.read_text(), place.read_text() if place.exists() else None


@pytest.mark.parametrize("ends", [0, 100])
def test_no_service_starts_and_the_policy_goes_however_that_ends(tmp_path: Path, ends: int) -> None:
    status, seen, policy = install(tmp_path, None, ENDS=str(ends))
    assert seen == "101 install -qq -y --no-install-recommends no-such-package\n"
    assert (status, policy) == (1 if ends else 0, None)


def test_a_policy_of_the_machines_own_stays(tmp_path: Path) -> None:
    own = "exit 7\n"
    assert install(tmp_path, own) == (0, "7 install -qq -y --no-install-recommends no-such-package\n", own)


def test_a_policy_that_was_left_behind_goes(tmp_path: Path) -> None:
    _, seen, policy = install(tmp_path, f"#!/bin/sh\n{OURS}\nexit 101\n")
    assert (seen[:4], policy) == ("101 ", None)


def test_who_may_not_install_is_told_what_is_missing_in_a_line() -> None:
    by_user = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups") if os.geteuid() == 0 else ()
    argv = [*by_user, "sh", "-s", "check", "dpkg", "no-such-package", "nor-this"]
    done = subprocess.run(argv, input=SCRIPT.read_text(), capture_output=True, text=True, timeout=60)
    how = "apt-get install --no-install-recommends no-such-package nor-this"
    words = f"check: Debian packages are missing; as root: {how}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)
