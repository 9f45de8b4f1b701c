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
"$here/../../scripts/apt-private.sh" source bookworm "$work" crun
dsc=$(find "$work" -name 'crun_*.dsc')
version=$(sed -n 's/^Version: //p' "$dsc" | head -1)
case $version in
"$CRUN_SOURCE_VERSION"-*) ;;
*) die "crun: Debian's source package is $version, $CRUN_SOURCE_VERSION is pinned: look at the difference, then change scripts/lib.sh" ;;
esac
# The archive's signature on the index has vouched for the file already.
dpkg-source --no-check -x "$dsc" "$work/src" >/dev/null 2>"$work/log"
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
strip "$work/src/crun"
"$work/src/crun" --version | grep -q "^crun version $CRUN_SOURCE_VERSION" || die "crun: the built program does not run"
if readelf -l "$work/src/crun" | grep -q INTERP; then die "crun: the built program is not static"; fi
mkdir "$work/out"
install -m 755 "$work/src/crun" "$work/out/crun"
printf '%s\n' "$version" >"$work/out/version"
replace "$work/out" "$out" "$key"
say "crun: $version, $(stat -c %s "$out/crun") bytes"
