"""One pod's enrolment: the shim, the protocol, Istio's annotations and skip rules, and the server behind the socket."""
