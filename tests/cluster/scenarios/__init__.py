"""What happens in the cluster, a file a scenario, in the order in which they run."""

from tests.cluster.scenario import Scenario
from tests.cluster.scenarios import (
    ambient,
    base,
    chart,
    crowd,
    dropin,
    istioctl,
    kills,
    load,
    migration,
    nodes,
    observing,
    plugin,
    protocols,
    removal,
    shadow,
    sidecars,
    upgrade,
    users,
    ways,
)

# The longest come first, so that two clusters end at about the same time.
SCENARIOS = (
    Scenario("base", base.checks),
    Scenario("upgrade", upgrade.checks),
    Scenario("chart", chart.checks),
    Scenario("ambient", ambient.checks),
    Scenario("kills", kills.checks),
    Scenario("migration", migration.checks),
    Scenario("dropin", dropin.checks),
    Scenario("shadow", shadow.checks),
    Scenario("crowd", crowd.checks),
    Scenario("istioctl", istioctl.checks),
    Scenario("plugin", plugin.checks),
    Scenario("removal", removal.checks),
    Scenario("nodes", nodes.checks),
    Scenario("load", load.checks),
    Scenario("sidecars", sidecars.checks),
    Scenario("ways", ways.checks),
    Scenario("protocols", protocols.checks),
    Scenario("observing", observing.checks),
    Scenario("users", users.checks),
)
