#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts gVisor's runsc of Debian 12 into the cache as lab/runsc/runsc, for the bench,
# and prints its path.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
out=$KATA_CACHE/lab/runsc
key=bookworm-1
if ! current "$out" "$key"; then
	say "runsc: unpacking that of Debian 12"
	work=$(scratch)
	trap 'rm -rf "$work"' EXIT
	"$here/apt-private.sh" unpack bookworm "$work/root" runsc
	install -D -m 755 "$work/root/usr/bin/runsc" "$work/out/runsc"
	replace "$work/out" "$out" "$key"
fi
echo "$out/runsc"
