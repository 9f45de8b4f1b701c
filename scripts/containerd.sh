#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts the lab's container runtimes into the cache: containerd 2.4 built through
# the Go module proxy in a module of its own (its dependencies never mix with
# ours), containerd 1.6 and runc unpacked from Debian's packages.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
lab=$KATA_CACHE/lab

build_24() {
	local key="$CONTAINERD_24_VERSION" work
	current "$lab/containerd-2.4" "$key" && return
	say "containerd $CONTAINERD_24_VERSION: building (about four minutes on two cores, once)"
	work=$(scratch)
	mkdir "$work/out"
	(
		cd "$work"
		export CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off
		go mod init kata.invalid/lab 2>/dev/null
		go get -tool "github.com/containerd/containerd/v2/cmd/containerd@$CONTAINERD_24_VERSION" \
			"github.com/containerd/containerd/v2/cmd/ctr@$CONTAINERD_24_VERSION" \
			"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$CONTAINERD_24_VERSION" 2>&1 | tail -3 >&2
		for name in containerd ctr containerd-shim-runc-v2; do
			say "containerd $CONTAINERD_24_VERSION: $name"
			go build -trimpath -buildvcs=false -tags "static_build osusergo netgo no_btrfs no_devmapper no_zfs no_tracing" \
				-ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD_24_VERSION" \
				-o "out/$name" "github.com/containerd/containerd/v2/cmd/$name"
		done
	)
	replace "$work/out" "$lab/containerd-2.4" "$key"
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
build_24
