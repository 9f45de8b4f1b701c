#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks the guest kernel's package (never installs it) into the cache:
#   kernel/<package>/boot/vmlinuz-<release>, kernel/<package>/lib/modules/<release>
#   kernel/current -> <package>, kernel/<package>/modules -> lib/modules/<release>
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
dir=$KATA_CACHE/kernel
package=$KERNEL_PACKAGE

if ! current "$dir/$package" "$package"; then
	if [ -z "$("$here/apt-private.sh" version bookworm "$package")" ]; then
		package=$("$here/apt-private.sh" newest bookworm "^linux-image-${KERNEL_SERIES//./\\.}-[0-9]+-cloud-amd64\$")
		[ -n "$package" ] || die "kernel: the Debian archive has no linux-image-$KERNEL_SERIES-*-cloud-amd64"
		say "kernel: the archive no longer has $KERNEL_PACKAGE; using $package"
	fi
	if ! current "$dir/$package" "$package"; then
		say "kernel: unpacking $package"
		work=$(scratch)
		trap 'rm -rf "$work"' EXIT
		"$here/apt-private.sh" version bookworm "$package" >"$work/version"
		"$here/apt-private.sh" unpack bookworm "$work/root" "$package"
		cp "$work/version" "$work/root/version"
		release=${package#linux-image-}
		[ -f "$work/root/boot/vmlinuz-$release" ] || die "kernel: $package holds no boot/vmlinuz-$release"
		ln -s "lib/modules/$release" "$work/root/modules"
		replace "$work/root" "$dir/$package" "$package"
	fi
fi
ln -sfn "$package" "$dir/current"
