"""The agent's DaemonSet on a lab node."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cri_api.v1 import api_pb2 as cri

from tests.lab.containerd import SECONDS, Containerd


def as_daemonset(
    runtime: Containerd,
    objects: Sequence[dict[str, Any]],
    image: str,
    settings: Mapping[str, str],
    host: Mapping[str, Path],
    extra: Mapping[Path, Path],
) -> str:
    """Run the DaemonSet's pod as kubelet would, on the node's network; returns its container.

    `settings` replace those of the DaemonSet, `host` says what this lab has in place of a path of the node, and `extra`
    is mounted besides.
    """
    daemonset = next(each for each in objects if each["kind"] == "DaemonSet")
    spec = daemonset["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    variables = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    scratch = runtime.node.directory / "daemonset-tmp"
    scratch.mkdir()
    mounts = [
        cri.Mount(
            container_path=each["mountPath"],
            host_path=str(host.get(paths[each["name"]], paths[each["name"]] or scratch)),
        )
        for each in container["volumeMounts"]
    ]
    mounts += [cri.Mount(container_path=str(inside), host_path=str(outside)) for inside, outside in extra.items()]
    wanted = container["securityContext"]
    namespaces = cri.NamespaceOption(
        network=cri.NamespaceMode.NODE, pid=cri.NamespaceMode.NODE if spec["hostPID"] else cri.NamespaceMode.CONTAINER
    )
    context = cri.LinuxContainerSecurityContext(
        run_as_user=cri.Int64Value(value=wanted["runAsUser"]),
        readonly_rootfs=wanted["readOnlyRootFilesystem"],
        privileged=wanted["privileged"],
        capabilities=cri.Capability(
            add_capabilities=wanted["capabilities"]["add"], drop_capabilities=wanted["capabilities"]["drop"]
        ),
        seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.ProfileType.Unconfined),
        namespace_options=namespaces,
    )
    parent = f"/{runtime.node.cgroup.name}/daemonset"
    (runtime.node.cgroup / "daemonset").mkdir()
    sandbox_config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="istio-cni-node-lab", namespace="istio-system", uid=str(uuid.uuid4())),
        log_directory=str(runtime.directory),
        linux=cri.LinuxPodSandboxConfig(
            cgroup_parent=parent,
            security_context=cri.LinuxSandboxSecurityContext(namespace_options=namespaces),
        ),
    )
    sandbox = runtime.stub.RunPodSandbox(
        cri.RunPodSandboxRequest(config=sandbox_config), timeout=SECONDS
    ).pod_sandbox_id
    made = runtime.stub.CreateContainer(
        cri.CreateContainerRequest(
            pod_sandbox_id=sandbox,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=container["name"]),
                image=cri.ImageSpec(image=image),
                args=container["args"],
                envs=[cri.KeyValue(key=key, value=value) for key, value in {**variables, **settings}.items()],
                log_path=f"{container['name']}.log",
                mounts=mounts,
                linux=cri.LinuxContainerConfig(security_context=context),
            ),
            sandbox_config=sandbox_config,
        ),
        timeout=SECONDS,
    ).container_id
    runtime.stub.StartContainer(cri.StartContainerRequest(container_id=made), timeout=SECONDS)
    return str(made)
