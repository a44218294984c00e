"""What happens in the cluster, a file a scenario, in the order in which they run."""

from tests.cluster.scenario import Scenario
from tests.cluster.scenarios import (
    base,
    chart,
    crowd,
    dropin,
    istioctl,
    kills,
    load,
    migration,
    nodes,
    plugin,
    protocols,
    removal,
    sidecars,
    upgrade,
    users,
    ways,
)

SCENARIOS = (
    Scenario("base", base.checks),
    Scenario("load", load.checks),
    Scenario("upgrade", upgrade.checks),
    Scenario("chart", chart.checks),
    Scenario("kills", kills.checks),
    Scenario("removal", removal.checks),
    Scenario("nodes", nodes.checks),
    Scenario("sidecars", sidecars.checks),
    Scenario("users", users.checks),
    Scenario("ways", ways.checks),
    Scenario("protocols", protocols.checks),
    Scenario("plugin", plugin.checks),
    Scenario("dropin", dropin.checks),
    Scenario("istioctl", istioctl.checks),
    Scenario("migration", migration.checks),
    Scenario("crowd", crowd.checks, is_alone=True),
)
