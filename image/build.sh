#!/usr/bin/env bash
# Builds the Dockerfile without any registry: `make image` → build/image/sidestep.tar, an OCI archive, and
# build/image/sbom.spdx.json, which lists the Debian and Python packages in it.
#
# The base is a Debian 12 made by debootstrap from the same mirror as this machine's own packages. The build sees the
# machine's pip configuration and certificates; none of them stays in the image.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/build/image
mkdir -p "$out"
storage=(--root "$out/storage" --runroot "$out/run" --storage-driver overlay)

mirror() { # where apt itself gets Debian from
    apt-cache policy base-files | grep -oE 'https?://[^ ]+' | head -1
}

if ! buildah "${storage[@]}" inspect localhost/debian:12 > /dev/null 2>&1; then
    echo "image: making a Debian 12 base"
    rm -rf "$out/base"
    debootstrap --variant=minbase --include=ca-certificates bookworm "$out/base" "$(mirror)" > "$out/debootstrap.log"
    rm -rf "$out/base/var/cache/apt/archives" "$out/base/usr/share/doc" "$out/base/usr/share/man"
    container=$(buildah "${storage[@]}" from scratch)
    buildah "${storage[@]}" copy -q "$container" "$out/base" / > /dev/null
    buildah "${storage[@]}" commit -q --rm "$container" localhost/debian:12 > /dev/null
    rm -rf "$out/base"
fi

# what the machine's own apt and pip go by, for the time of the build
mounts=()
for path in /etc/pip.conf /etc/ssl/certs; do
    if [ -e "$path" ]; then mounts+=(--volume "$path:$path:ro"); fi
done
config=$(python3 -m pip config list 2> /dev/null | sed -n "s/^global\.index-url='\(.*\)'$/\1/p")
index=${PIP_INDEX_URL:-$config}
if [ -n "$index" ]; then
    printf '[global]\nindex-url = %s\n' "$index" > "$out/pip.conf"
    mounts+=(--volume "$out/pip.conf:/etc/pip.conf:ro")
fi

echo "image: building"
version=$(sed -n 's/^VERSION = "\([^"]*\)".*/\1/p' installer/__init__.py)
buildah "${storage[@]}" build -q --isolation chroot --layers --network host "${mounts[@]}" \
    --build-arg BASE=localhost/debian:12 --build-arg VERSION="$version" --format docker --tag localhost/sidestep . > "$out/id"
rm -f "$out/sidestep.tar" "$out/sbom.spdx.json"
buildah "${storage[@]}" push -q localhost/sidestep "oci-archive:$out/sidestep.tar:localhost/sidestep:latest"
SYFT_CHECK_FOR_APP_UPDATE=false .venv/bin/syft scan -q "oci-archive:$out/sidestep.tar" \
    --source-name sidestep --source-version "$version" -o "spdx-json=$out/sbom.spdx.json"
echo "image: build/image/sidestep.tar, $(du -h "$out/sidestep.tar" | cut -f1)"
