# SPDX-License-Identifier: Apache-2.0
# Shared by the set-up scripts; sourced, never run.
# shellcheck shell=bash

# KATA_CACHE holds everything that is downloaded or built once for a version.
KATA_CACHE="${KATA_CACHE:-$HOME/.cache/kata-go}"
export KATA_CACHE

# What is pinned. A change here makes a new key, so the next run renews the artefact.
CONTAINERD_17_VERSION=v1.7.35
CONTAINERD_22_VERSION=v2.2.9
CONTAINERD_24_VERSION=v2.4.2
KERNEL_SERIES=6.1.0
KERNEL_PACKAGE=linux-image-6.1.0-54-cloud-amd64
CRUN_SOURCE_VERSION=1.8.1
IPTABLES_SOURCE_VERSION=1.8.9
# The source of the kernel that `make kernel` builds.
KERNEL_SOURCE=linux-source-6.12
KERNEL_SOURCE_SUITE=trixie
KERNEL_BUILD_TIME='Thu Jan  1 00:00:00 UTC 2026' # part of the kernel, so it is not the clock's

# The clock of progress lines starts with the outermost script.
export KATA_SETUP_STARTED="${KATA_SETUP_STARTED:-$(date +%s)}"
say() { printf '[%4ds] %s\n' $(($(date +%s) - KATA_SETUP_STARTED)) "$*" >&2; }
die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# current DIR KEY: true when DIR was finished for KEY.
current() { [ -f "$1/.key" ] && [ "$(cat "$1/.key")" = "$2" ]; }

# replace NEW DIR KEY: NEW becomes DIR in one rename, marked as finished for KEY.
# What was half made by an interrupted run therefore never looks finished.
replace() {
	printf '%s' "$3" >"$1/.key"
	rm -rf "$2"
	mkdir -p "$(dirname "$2")"
	mv "$1" "$2"
}

# scratch: a fresh directory on the cache's file system, so that replace can rename it.
scratch() {
	mkdir -p "$KATA_CACHE/tmp"
	mktemp -d "$KATA_CACHE/tmp/work.XXXXXX"
}

# install_packages PKG…: installs those of the system's packages that are missing; what is there is not upgraded.
install_packages() {
	local missing=() p
	for p in "$@"; do
		dpkg-query -W -f '${Status}\n' "$p" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$p")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null || die "missing packages (${missing[*]}) and no apt-get to install them with"
	say "apt: installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	local install=(apt-get -qq -y --no-install-recommends --no-upgrade install "${missing[@]}")
	# A machine without indexes, or with old ones that name files that are gone, needs them renewed first.
	"${install[@]}" >&2 || {
		say "apt: renewing the package index"
		apt-get -qq update >&2
		"${install[@]}" >&2
	}
}

# source_package WORK PACKAGE VERSION: Debian 12's source of PACKAGE in WORK/src, and its version in $version,
# which must be VERSION up to Debian's revision.
source_package() {
	local work=$1 package=$2 pinned=$3 dsc
	"$here/../../scripts/apt-private.sh" source bookworm "$work" "$package"
	dsc=$(find "$work" -maxdepth 1 -name "${package}_*.dsc")
	version=$(sed -n 's/^Version: //p' "$dsc" | head -1)
	case $version in
	"$pinned"-*) ;;
	*) die "$package: Debian's source package is $version, $pinned is pinned: look at the difference, then change scripts/lib.sh" ;;
	esac
	# The archive's signature on the index has vouched for the file already.
	dpkg-source --no-check -x "$dsc" "$work/src" >/dev/null 2>"$work/log"
}

# guest_program WORK PACKAGE FILE NAME OUT KEY: FILE, which was built below WORK, becomes OUT/NAME, stripped, with the
# file "version" beside it, provided that it is static.
guest_program() {
	local work=$1 package=$2 file=$3 name=$4 out=$5 key=$6
	strip "$file"
	if readelf -l "$file" | grep -q INTERP; then die "$package: the built program is not static"; fi
	mkdir "$work/out"
	install -m 755 "$file" "$work/out/$name"
	printf '%s\n' "$version" >"$work/out/version"
	replace "$work/out" "$out" "$key"
	say "$package: $version, $(stat -c %s "$out/$name") bytes"
}

# newer_program WORK BINARY "LIBRARY…" PACKAGE…: a program of trixie that runs on
# an older release. It is unpacked with PACKAGE… below WORK; WORK/out gets lib/, flat,
# with the program, its loader and LIBRARY…, and a script of the program's name.
newer_program() {
	local work=$1 binary=$2 libraries=$3 name=${2##*/} lib found
	shift 3
	"$here/apt-private.sh" unpack trixie "$work/root" libc6 "$@"
	mkdir -p "$work/out/lib"
	for lib in ld-linux-x86-64.so.2 libc.so.6 $libraries; do
		found=$(find "$work/root" -name "$lib" -print | head -1)
		[ -n "$found" ] || die "$name: $lib is in none of the packages unpacked from trixie"
		cp -L "$found" "$work/out/lib/$lib"
	done
	install -m 755 "$work/root/$binary" "$work/out/lib/$name"
	cat >"$work/out/$name" <<-WRAPPER
		#!/bin/sh
		# Runs the program through the loader it was built for; exec keeps the pid.
		lib=\$(dirname "\$0")/lib
		exec "\$lib/ld-linux-x86-64.so.2" --library-path "\$lib" "\$lib/$name" "\$@"
	WRAPPER
	chmod 755 "$work/out/$name"
	"$work/out/$name" --version >&2 || die "$name: the unpacked program does not run (see the loader's message above)"
}
