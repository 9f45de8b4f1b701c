#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guest's packet filter tool: iptables from Debian's source package, one static program for IPv4 and IPv6
# that speaks to the kernel's xtables (the "legacy" one). That for nf_tables would need two libraries more and a larger
# part of the kernel, and shows the same rules no better. Result: $KATA_CACHE/iptables/iptables.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/../../scripts/lib.sh"
out=$KATA_CACHE/iptables
key=$IPTABLES_SOURCE_VERSION-static-1
current "$out" "$key" && exit 0

say "iptables: building $IPTABLES_SOURCE_VERSION static (about 20 s, once)"
work=$(scratch)
trap 'rm -rf "$work"' EXIT
source_package "$work" iptables "$IPTABLES_SOURCE_VERSION"
(
	cd "$work/src"
	# The lock is where the guest can write.
	./configure --disable-shared --enable-static --disable-nftables --disable-connlabel --disable-devel --disable-libipq \
		--with-xt-lock-name=/run/xtables.lock \
		CFLAGS="-Os -ffunction-sections -fdata-sections" LDFLAGS="-Wl,--gc-sections"
	make -j"$(nproc)" LDFLAGS="-all-static -Wl,--gc-sections"
) >"$work/log" 2>&1 || {
	tail -30 "$work/log" >&2
	die "iptables: the build failed; its last lines are above"
}
program=$work/src/iptables/xtables-legacy-multi
"$program" iptables --version | grep -q "^iptables v$IPTABLES_SOURCE_VERSION" || die "iptables: the built program does not run"
guest_program "$work" iptables "$program" iptables "$out" "$key"
