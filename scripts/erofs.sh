#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts mkfs.erofs into the cache as lab/erofs/mkfs.erofs: containerd's erofs differ
# makes layers of tar streams with it, which needs 1.7 (mkfs.erofs --tar) where
# Debian 12 has 1.5, so that of Debian 13 is unpacked with its libraries.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
out=$KATA_CACHE/lab/erofs
key=trixie-1
current "$out" "$key" && exit 0

say "erofs: unpacking mkfs.erofs of Debian 13 with its libraries"
work=$(scratch)
trap 'rm -rf "$work"' EXIT
newer_program "$work" usr/bin/mkfs.erofs \
	"libselinux.so.1 libpcre2-8.so.0 libuuid.so.1 liblz4.so.1 liblzma.so.5 libz.so.1 libdeflate.so.0 libzstd.so.1 libxxhash.so.0" \
	erofs-utils libselinux1 libpcre2-8-0 libuuid1 liblz4-1 liblzma5 zlib1g libdeflate0 libzstd1 libxxhash0
replace "$work/out" "$out" "$key"
