#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a fresh Debian 12 or Ubuntu machine with Go and root ready to build and
# test this repository. What is there already is left alone: a second run does
# no network access at all. Nothing is upgraded.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"

# Debian packages: VMM and its virtio-fs daemon, what builds the guest's programs,
# the protocol compiler, and the tools that the lab calls.
packages=(
	qemu-system-x86 qemu-system-common busybox-static
	gcc make pkg-config dpkg-dev binutils python3 git
	libcap-dev libseccomp-dev
	protobuf-compiler libprotobuf-dev
	iproute2 containernetworking-plugins lz4 zstd xz-utils e2fsprogs xfsprogs
)

# minimum_go: go.mod names the language version; `go` itself fetches a newer
# toolchain when it may, so only its absence is fatal.
command -v go >/dev/null || die "no go command in PATH: install Go 1.26 or newer and run this again"
[ "$(id -u)" = 0 ] || die "root is needed: the set-up installs packages, and the lab mounts and makes network namespaces"
case $(uname -m) in x86_64) ;; *) die "$(uname -m) is not supported yet: an x86_64 machine is needed" ;; esac

install_packages "${packages[@]}"
mkdir -p "$KATA_CACHE"
chmod 700 "$KATA_CACHE"
# One set-up at a time: a second one waits, and then finds everything done.
exec 9>"$KATA_CACHE/.lock"
flock 9
rm -rf "$KATA_CACHE/tmp"

"$here/kernel.sh"
"$here/../images/crun/build.sh"
"$here/../images/iptables/build.sh"
"$here/virtiofsd.sh"
"$here/erofs.sh"
"$here/containerd.sh"
say "set-up: complete ($KATA_CACHE)"
