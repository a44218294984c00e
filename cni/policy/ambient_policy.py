"""What to capture for a Pod in ambient mode."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AmbientPolicy:
    """The defaults are those of a Pod without annotations, with an agent whose DNS capture is off."""

    dns_capture: bool = False
    bypass_inbound_capture: bool = False  # Istio's ingress mode: inbound plaintext goes to the application
    ipv6: bool = True
    trust_mark: bool = False  # whether ztunnel's mark is enough, whoever has opened the socket (Istio's rules)
