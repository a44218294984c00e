"""The command `pods`."""

import click

from installer.commands.command import (
    Command,
    all_namespaces_option,
    complete_pod,
    namespace_option,
    no_headers_option,
    one_namespace,
    qualified,
)
from installer.commands.output import output_option, show
from installer.settings import Attachment, Logging, Node, take


@click.command(cls=Command)
@take(Attachment)
@take(Node)
@click.argument("name", required=False, shell_complete=complete_pod)
@namespace_option("Pods")
@all_namespaces_option
@no_headers_option
@click.option("--refused", "is_refused", is_flag=True, help="List the pods that the agent has refused, and why.")
@output_option
def pods(
    attachment: Attachment,
    node: Node,
    output: str,
    name: str | None,
    namespace: str,
    everywhere: bool,
    no_headers: bool,
    is_refused: bool,
) -> None:
    """List this node's mesh pods, or show everything about one.

    NAME is the pod's NAME or NAMESPACE/NAME. Its policy is shown in Istio's words: the annotations that would give this
    policy. "Pod now" compares it with what the Pod asks for now, and says of each changed annotation whether the
    running pod follows it. Denied ports are followed within a second. So are ports and ranges that are captured, if the
    pod has sidestep.io/live-policy, or its node --live-policy.

    STATE is "captured" if all is well, or "ambient" for a pod in ambient mode. Other states say what is wrong: "not
    steered", "stray processes", "proxy absent" and so on; "pending" is a pod that ztunnel does not have yet. Pods with
    a sidecar that are not enrolled have a line too: "Istio's rules" capture them, or they are "left alone" or "not
    captured". Below the table are the reasons, and the pods that the plugin or the agent let pass when they were made.
    Only a running agent knows these, those that it has refused (--refused), and why a pod is pending.

    \b
        sidestep pods                        the mesh pods of this node
        sidestep pods -n shop -o wide        of one namespace, with addresses
        sidestep pods shop/web-0             everything about one
        sidestep pods --refused              pods that don't start
    """  # noqa: D301 (after \b, click keeps a paragraph's line breaks)
    from installer.agent.logs import configure_logging
    from installer.commands.pods.pod_document import others_of, pod_document, pods_documents
    from installer.commands.pods.pods_table import pod_text, pods_table

    configure_logging(Logging(log_level="warning"))  # manifests that can't be read are reported on standard error
    wanted = one_namespace(namespace, everywhere)
    if is_refused:
        if name is not None:
            raise click.UsageError("give either NAME or --refused")
        from installer.commands.pods.refused import refused_pods, refused_text

        refused = refused_pods(node.cni_agent_run_dir).of(wanted)
        show(refused.document(), output, lambda: refused_text(refused))
    elif name is None:
        documents = [each for each in pods_documents(attachment, node) if wanted in ("", each["namespace"])]
        others = None if wanted or no_headers else others_of(attachment, node)
        show(documents, output, lambda: pods_table(documents, others, output == "wide", not no_headers))
    else:
        document = pod_document(attachment, node, qualified(name, namespace))
        show(document, output, lambda: pod_text(document))
