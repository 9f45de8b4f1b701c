#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts what `make test-k8s` runs into the cache: the Kubernetes programs, built
# by the Go module proxy from the module in integration/kubernetes/components
# (its go.mod names the version), etcd unpacked from Debian's package, and the
# few tools that kube-proxy and kubelet call. A finished cache is left alone.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
components=$here/../integration/kubernetes/components
programs=(kubectl kube-proxy kube-scheduler kube-controller-manager kube-apiserver kubelet)

# kube-proxy programs iptables and conntrack; kubelet mounts by the mount command.
packages=(iptables conntrack mount)
missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${Status}\n' "$p" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
	say "apt: installing ${missing[*]}"
	DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends --no-upgrade install "${missing[@]}" >&2
fi

mkdir -p "$KATA_CACHE"
exec 8>"$KATA_CACHE/.kubernetes.lock"
flock 8

# build: all programs share one build cache of their own (it grows to several
# gigabytes). An interrupted build goes on from it, and from the programs that
# are done; a finished one removes it. The module is copied, so that a checkout
# of another revision meanwhile does not pull it away.
build() {
	local version key dir=$KATA_CACHE/kubernetes started stamp
	version=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$components/go.mod")
	[ -n "$version" ] || die "integration/kubernetes/components/go.mod requires no k8s.io/kubernetes"
	key="$version $(sha256sum <"$components/go.mod" | cut -c1-16)"
	current "$dir/bin" "$key" && return
	say "kubernetes $version: building ${#programs[@]} programs, once (about 15 minutes on two idle cores)"
	mkdir -p "$dir/module" "$dir/new"
	cp "$components/go.mod" "$components/go.sum" "$dir/module/"
	started=$(date +%s)
	stamp="-X k8s.io/component-base/version.gitVersion=$version"
	stamp+=" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$(cut -d. -f2 <<<"$version")"
	(
		cd "$dir/module"
		export CGO_ENABLED=0 GOWORK=off GOCACHE=$dir/build
		go mod download
		say "kubernetes: modules downloaded after $(($(date +%s) - started)) s"
		for program in "${programs[@]}"; do
			go build -trimpath -buildvcs=false -ldflags "-s -w $stamp" -o "$dir/new/$program" "k8s.io/kubernetes/cmd/$program"
			say "kubernetes: $program after $(($(date +%s) - started)) s"
		done
	)
	replace "$dir/new" "$dir/bin" "$key"
	rm -rf "$dir/build" "$dir/module"
}

# etcd 3.4 is what bookworm has; the API server needs nothing newer for one node.
etcd() {
	local out=$KATA_CACHE/kubernetes/etcd key=bookworm-1 work
	current "$out" "$key" && return
	say "etcd: unpacking Debian's etcd-server"
	work=$(scratch)
	mkdir "$work/out"
	"$here/apt-private.sh" unpack bookworm "$work/root" etcd-server
	install -m 755 "$work/root/usr/bin/etcd" "$work/out/etcd"
	replace "$work/out" "$out" "$key"
	rm -rf "$work"
}

etcd
build
say "kubernetes: ready ($KATA_CACHE/kubernetes)"
