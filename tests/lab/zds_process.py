"""`python -m tests.lab.zds_process SOCKET`: a double of ztunnel as a process, from ZDS to the connections of pods.

It ends with its stdin. Clients of pods get one line of JSON, as tests/lab/ztunnel.py says.
"""

import os
import sys
from pathlib import Path

from tests.lab import zds_client, ztunnel


class _Serving:
    """A pod that is served."""

    def __init__(self, uid: str, netns: int) -> None:
        found = os.fstat(netns)
        self.namespace = found.st_dev, found.st_ino
        self._proxies = ztunnel.Ztunnel()
        try:
            self._proxies.add(uid, netns)
        except OSError as error:
            raise zds_client.StartError(f"failure to start proxy: {error.strerror}") from error
        finally:
            os.close(netns)

    def close(self) -> None:
        self._proxies.close()


if __name__ == "__main__":
    with zds_client.Ztunnel(Path(sys.argv[1]), start=_Serving).running():
        print("ready", flush=True)
        sys.stdin.read()
