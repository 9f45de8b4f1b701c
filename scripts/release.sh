#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# release.sh BUILD KERNEL OUT NAME: packs a finished build (bin/ and images/, as
# `kata-ctl install --from` takes it) with the kernel's configuration and the
# names of the source packages as OUT/NAME.tar.zst, and writes the digests of the
# archive and of every file in it to OUT/NAME.sha256. Equal input gives an equal archive.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
[ $# = 4 ] || die "usage: release.sh BUILD KERNEL OUT NAME"
build=$1 kernel=$2 out=$3 name=$4
for f in bin/containerd-shim-kata-v2 bin/kata-ctl bin/kata-agent images/manifest.json; do
	[ -e "$build/$f" ] || die "release: $build/$f is missing: run make image KERNEL=small"
done

rm -rf "${out:?}/$name"
mkdir -p "$out/$name"
trap 'rm -rf "${out:?}/$name"' EXIT
cp -r "$build/bin" "$build/images" "$out/$name/"
cp "$here/../LICENSE" "$out/$name/"
cp "$kernel/config" "$out/$name/images/kernel.config"
cat >"$out/$name/SOURCES" <<TEXT
images/vmlinux is Linux (GPL-2.0), built by scripts/kernel-build.sh from Debian's package
$KERNEL_SOURCE $(cat "$kernel/version") with images/kernel.config.
images/kata-initrd.img holds crun (GPL-2.0), built by images/crun/build.sh from Debian's source package
crun $(cat "$KATA_CACHE/crun/version"), and iptables (GPL-2.0), built by images/iptables/build.sh from Debian's source
package iptables $(cat "$KATA_CACHE/iptables/version"). Everything else is of this repository (LICENSE).
TEXT
(cd "$out/$name" && find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum) >"$out/$name.sha256"
cp "$out/$name.sha256" "$out/$name/SHA256SUMS"
tar -C "$out" --sort=name --owner=0 --group=0 --numeric-owner --mtime="$KERNEL_BUILD_TIME" -c "$name" | zstd -q -19 -T0 -f -o "$out/$name.tar.zst"
(cd "$out" && sha256sum "$name.tar.zst") >>"$out/$name.sha256"
cat "$out/$name.sha256"
say "release: $out/$name.tar.zst, $(stat -c %s "$out/$name.tar.zst") bytes"
