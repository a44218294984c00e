"""What happens in the cluster, a file a scenario, in the order in which they run."""

from tests.cluster.scenario import Scenario
from tests.cluster.scenarios import base, kills, load, upgrade

SCENARIOS = (
    Scenario("base", base.checks),
    Scenario("load", load.checks),
    Scenario("upgrade", upgrade.checks),
    Scenario("kills", kills.checks),
)
