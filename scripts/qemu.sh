#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts QEMU 10 of Debian 13 into the cache as lab/qemu/qemu-system-x86_64, for the tests
# that the QEMU of Debian 12 does not survive (KATA_TEST_QEMU): it is unpacked
# together with that release's own loader and libraries. Firmware is the system's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
out=$KATA_CACHE/lab/qemu
key=trixie-1
if ! current "$out" "$key"; then
	say "QEMU: unpacking that of Debian 13 with its libraries"
	work=$(scratch)
	trap 'rm -rf "$work"' EXIT
	newer_program "$work" usr/bin/qemu-system-x86_64 "libaio.so.1t64 libatomic.so.1 libblkid.so.1 libbpf.so.1 libcap.so.2 libcapstone.so.5
		libcrypto.so.3 libdaxctl.so.1 libelf.so.1 libfdt.so.1 libffi.so.8 libfuse3.so.4 libgio-2.0.so.0 libglib-2.0.so.0 libgmodule-2.0.so.0
		libgmp.so.10 libgnutls.so.30 libgobject-2.0.so.0 libhogweed.so.6 libibverbs.so.1 libidn2.so.0 libjpeg.so.62 libkmod.so.2 libm.so.6
		libmount.so.1 libndctl.so.6 libnettle.so.8 libnl-3.so.200 libnl-route-3.so.200 libnuma.so.1 libp11-kit.so.0 libpcre2-8.so.0
		libpixman-1.so.0 libpmem.so.1 libpng16.so.16 librdmacm.so.1 libsasl2.so.2 libseccomp.so.2 libselinux.so.1 libslirp.so.0 libtasn1.so.6
		libudev.so.1 libunistring.so.5 liburing.so.2 libuuid.so.1 libvdeplug.so.2 libz.so.1 libzstd.so.1" \
		qemu-system-x86 libaio1t64 libatomic1 libblkid1 libbpf1 libcap2 libcapstone5 libssl3t64 libdaxctl1 libelf1t64 libfdt1 libffi8 libfuse3-4 \
		libglib2.0-0t64 libgmp10 libgnutls30t64 libhogweed6t64 libibverbs1 libidn2-0 libjpeg62-turbo libkmod2 libmount1 libndctl6 libnettle8t64 \
		libnl-3-200 libnl-route-3-200 libnuma1 libp11-kit0 libpcre2-8-0 libpixman-1-0 libpmem1 libpng16-16t64 librdmacm1t64 libsasl2-2 libseccomp2 \
		libselinux1 libslirp0 libtasn1-6 libudev1 libunistring5 liburing2 libuuid1 libvdeplug2t64 zlib1g libzstd1
	chmod 755 "$work/out"
	replace "$work/out" "$out" "$key"
fi
echo "$out/qemu-system-x86_64"
