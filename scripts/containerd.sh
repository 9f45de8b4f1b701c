#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts the lab's container runtimes into the cache: containerd 2.4, 2.2 and 1.7
# built through the Go module proxy, each in a module of its own (its dependencies
# never mix with ours), containerd 1.6 and runc unpacked from Debian's packages.
# With the argument "all" also 2.2 and 1.7 with Kubernetes' CRI, for `make test-all`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
lab=$KATA_CACHE/lab

# build NAME MODULE VERSION TAG PROGRAM…: programs of containerd by the Go module
# proxy into lab/NAME. TAG is one more build tag. All releases share Go's build
# cache and the same tags, so that the standard library is compiled once.
build() {
	local name=$1 module=$2 version=$3 tag=$4 key="$3${4:+ $4}" work program packages
	shift 4
	packages=("${@/#/$module/cmd/}")
	current "$lab/$name" "$key" && return
	say "containerd $version: building, once"
	work=$(scratch)
	mkdir "$work/out"
	(
		cd "$work"
		export CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off
		go mod init kata.invalid/lab 2>/dev/null
		go get -tool "${packages[@]/%/@$version}" 2>&1 | tail -3 >&2
		for program in "$@"; do
			say "containerd $version: $program"
			go build -trimpath -buildvcs=false -tags "static_build osusergo netgo no_btrfs no_devmapper no_zfs no_aufs no_tracing $tag" \
				-ldflags "-s -w -X $module/version.Version=$version" \
				-o "out/$program" "$module/cmd/$program"
		done
	)
	replace "$work/out" "$lab/$name" "$key"
	rm -rf "$work"
}

# unpack NAME PACKAGE KEY BINARY…: named programs of a bookworm package, flat in lab/NAME.
unpack() {
	local name=$1 package=$2 key=$3 work
	shift 3
	current "$lab/$name" "$key" && return
	say "$name: unpacking Debian's $package ($key)"
	work=$(scratch)
	mkdir "$work/out"
	"$here/apt-private.sh" unpack bookworm "$work/root" "$package"
	for program in "$@"; do install -m 755 "$work/root/$program" "$work/out/"; done
	replace "$work/out" "$lab/$name" "$key"
	rm -rf "$work"
}

# The key names what was asked for, not what the archive has today: a point
# release of the same packages does not make a finished cache stale.
unpack runc runc bookworm-1 usr/sbin/runc
unpack containerd-1.6 containerd bookworm-1 usr/bin/containerd usr/bin/ctr usr/bin/containerd-shim-runc-v2
build containerd-2.4 github.com/containerd/containerd/v2 "$CONTAINERD_24_VERSION" "" containerd ctr containerd-shim-runc-v2
# Only for what differs in how they start a shim: no Kubernetes, no shim of their own.
build containerd-2.2 github.com/containerd/containerd/v2 "$CONTAINERD_22_VERSION" no_cri containerd ctr
build containerd-1.7 github.com/containerd/containerd "$CONTAINERD_17_VERSION" no_cri containerd ctr
if [ "${1:-}" = all ]; then
	build containerd-2.2-cri github.com/containerd/containerd/v2 "$CONTAINERD_22_VERSION" "" containerd ctr
	build containerd-1.7-cri github.com/containerd/containerd "$CONTAINERD_17_VERSION" "" containerd ctr
fi
