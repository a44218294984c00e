"""`python -m tests.cluster.down [ID …]`: take down the given clusters, or all kept and ownerless ones."""

import os
import sys

from tests.cluster.cluster import abandoned, remove

if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("taking a cluster down needs root")
    for cluster in sys.argv[1:] or abandoned():
        remove(cluster)
        print(f"removed cluster {cluster}")
