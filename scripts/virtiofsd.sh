#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts the Rust virtiofsd into the cache as lab/virtiofsd/virtiofsd. Debian 12
# has only the C daemon of QEMU 7.2; the Rust one of Debian 13 needs glibc 2.39,
# so it is unpacked together with that release's own loader and libraries.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
out=$KATA_CACHE/lab/virtiofsd
key=trixie-1
current "$out" "$key" && exit 0

say "virtiofsd: unpacking the Rust daemon of Debian 13 with its libraries"
work=$(scratch)
trap 'rm -rf "$work"' EXIT
"$here/apt-private.sh" unpack trixie "$work/root" virtiofsd libc6 libgcc-s1 libcap-ng0 libseccomp2
mkdir -p "$work/out/lib"
# Flat, and nothing but what the program links: the directory is handed to the loader as it is.
for lib in ld-linux-x86-64.so.2 libc.so.6 libgcc_s.so.1 libcap-ng.so.0 libseccomp.so.2; do
	found=$(find "$work/root" -name "$lib" -print | head -1)
	[ -n "$found" ] || die "virtiofsd: $lib is in none of the packages unpacked from trixie"
	cp -L "$found" "$work/out/lib/$lib"
done
install -m 755 "$work/root/usr/libexec/virtiofsd" "$work/out/lib/virtiofsd"
cat >"$work/out/virtiofsd" <<'WRAPPER'
#!/bin/sh
# Runs the program through the loader it was built for; exec keeps the pid.
lib=$(dirname "$0")/lib
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$lib/virtiofsd" "$@"
WRAPPER
chmod 755 "$work/out/virtiofsd"
"$work/out/virtiofsd" --version >&2 || die "virtiofsd: the unpacked daemon does not run (see the loader's message above)"
replace "$work/out" "$out" "$key"
