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
