#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guest's OCI engine: crun from Debian's source package, static and
# without libsystemd. Dynamic linking would be most of what a short `crun exec`
# costs in the guest (docs/decisions.md). Result: $KATA_CACHE/crun/crun.
#
# dl and criu are off because both need a dynamic loader; yajl is the copy that
# the source package carries, because Debian's static one has another name.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/../../scripts/lib.sh"
out=$KATA_CACHE/crun
key=$CRUN_SOURCE_VERSION-static-2
current "$out" "$key" && exit 0

say "crun: building $CRUN_SOURCE_VERSION static (about half a minute, once)"
work=$(scratch)
trap 'rm -rf "$work"' EXIT
source_package "$work" crun "$CRUN_SOURCE_VERSION"
(
	cd "$work/src"
	# gcrypt only keys a cache of seccomp programs, which a fresh guest never has warm;
	# whether a machine has its headers must not change the result.
	ac_cv_search_gcry_check_version=no \
		./configure --disable-systemd --disable-dl --disable-criu --enable-embedded-yajl --disable-silent-rules \
		CFLAGS="-O2 -ffunction-sections -fdata-sections" LDFLAGS="-Wl,--gc-sections"
	make -j"$(nproc)" LDFLAGS="-all-static -Wl,--gc-sections"
) >"$work/log" 2>&1 || {
	tail -30 "$work/log" >&2
	die "crun: the build failed; its last lines are above"
}
"$work/src/crun" --version | grep -q "^crun version $CRUN_SOURCE_VERSION" || die "crun: the built program does not run"
guest_program "$work" crun "$work/src/crun" crun "$out" "$key"
