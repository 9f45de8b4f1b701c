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
newer_program "$work" usr/libexec/virtiofsd "libgcc_s.so.1 libcap-ng.so.0 libseccomp.so.2" \
	virtiofsd libgcc-s1 libcap-ng0 libseccomp2
replace "$work/out" "$out" "$key"
