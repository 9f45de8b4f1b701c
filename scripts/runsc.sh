#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts gVisor's runsc of Debian 12 into the cache as lab/runsc/runsc, for the bench,
# and prints its path. That release takes every network namespace of a newer kernel for
# the host's and refuses it, so its containers have no network.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
out=$KATA_CACHE/lab/runsc
key=bookworm-2
if ! current "$out" "$key"; then
	say "runsc: unpacking that of Debian 12"
	work=$(scratch)
	trap 'rm -rf "$work"' EXIT
	"$here/apt-private.sh" unpack bookworm "$work/root" runsc
	install -D -m 755 "$work/root/usr/bin/runsc" "$work/out/lib/runsc"
	cat >"$work/out/runsc" <<-'WRAPPER'
		#!/bin/sh
		exec "$(dirname "$0")/lib/runsc" --network=none "$@"
	WRAPPER
	chmod 755 "$work/out/runsc"
	replace "$work/out" "$out" "$key"
fi
echo "$out/runsc"
