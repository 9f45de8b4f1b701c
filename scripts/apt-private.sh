#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Reads Debian packages of any suite without touching the system's own package
# state: the source list, indexes and downloads are private, below the cache.
# The mirror is whichever Debian mirror this machine's apt is configured with.
#
#   apt-private.sh update  SUITE              fetch the suite's indexes
#   apt-private.sh newest  SUITE REGEX        newest package whose name matches
#   apt-private.sh version SUITE PKG          the version apt would take
#   apt-private.sh unpack  SUITE DIR PKG...   download and unpack into DIR
#   apt-private.sh source  SUITE DIR PKG      download a source package into DIR
#
# Nothing is ever installed or upgraded by this script.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"

[ $# -ge 2 ] || die "usage: apt-private.sh update|newest|version|unpack|source SUITE …"
action=$1 suite=$2
shift 2
dir=$KATA_CACHE/apt/$suite

# configured prints "uri suite" for every enabled binary source of
# main, from both forms of source list (sources.list(5)).
configured() {
	local etc=${KATA_APT_ETC:-/etc/apt}
	{
		# One-line form: deb [options] URI SUITE COMPONENT…
		find "$etc" -maxdepth 2 -name '*.list' -print0 | sort -z | xargs -0 -r cat | awk '
			$1 != "deb" { next }
			{ i = 2
			  if ($2 ~ /^\[/) { while (i <= NF && $i !~ /\]$/) i++; i++ }
			  for (c = i + 2; c <= NF; c++) if ($c == "main") print $i, $(i+1) }'
		# deb822 form: stanzas of "Field: value".
		find "$etc" -maxdepth 2 -name '*.sources' -print0 | sort -z | while IFS= read -r -d '' f; do
			cat "$f"
			echo
		done | awk '
			function flush(   u, s, i, j) {
				if (types ~ /(^| )deb( |$)/ && comps ~ /(^| )main( |$)/ && enabled != "no") {
					split(uris, u, " "); split(suites, s, " ")
					for (i in u) for (j in s) print u[i], s[j]
				}
				types = uris = suites = comps = enabled = field = ""
			}
			function put(v) {
				gsub(/^[ \t]+|[ \t]+$/, "", v)
				if (field == "types") types = types " " v
				else if (field == "uris") uris = uris " " v
				else if (field == "suites") suites = suites " " v
				else if (field == "components") comps = comps " " v
				else if (field == "enabled") enabled = tolower(v)
			}
			/^#/ { next }
			/^[ \t]*$/ { flush(); next }
			/^[ \t]/ { put($0); next }
			{ field = tolower($0); sub(/:.*/, "", field); v = $0; sub(/^[^:]*:/, "", v); put(v) }
			END { flush() }'
	} | sort -u
}

# sources writes the private list for the suite: the main archive, and for the
# machine's own release also its updates and security suites, where a pinned
# kernel may live.
sources() {
	local lines main security keyring codename uri s
	keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -f "$keyring" ] || die "$keyring is missing: install the package debian-archive-keyring"
	codename='bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable'
	lines=$(configured)
	main=$(awk -v c="^($codename)\$" '$2 ~ c && !seen++ { print $1 }' <<<"$lines")
	security=$(awk -v c="^($codename)-security\$" '$2 ~ c && !seen++ { print $1 }' <<<"$lines")
	[ -n "$main" ] || die "no Debian mirror in this machine's apt sources, and some pieces come from Debian ($suite)." \
		"Add one (deb <mirror> bookworm main, signed by $keyring; pin it low so that nothing installs from it) and run this again."
	{
		echo "deb [signed-by=$keyring] $main $suite main"
		echo "deb-src [signed-by=$keyring] $main $suite main"
		while read -r uri s; do
			[ "$s" != "$suite-updates" ] || echo "deb [signed-by=$keyring] $uri $s main"
		done <<<"$lines"
		case $suite in
		sid | unstable) ;;
		*) [ -z "$security" ] || for s in deb deb-src; do echo "$s [signed-by=$keyring] $security $suite-security main"; done ;;
		esac
	}
}

apt_options=(
	-o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
	-o "Dir::State=$dir/state" -o "Dir::State::Lists=$dir/lists" -o "Dir::State::status=$dir/status" -o "Dir::Cache=$dir/cache"
	-o APT::Sandbox::User=root -o Debug::NoLocking=1 -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
	-o APT::Update::Post-Invoke::= -o Acquire::Retries=2 -o Acquire::http::Timeout=60
)

prepare() {
	mkdir -p "$dir/lists/partial" "$dir/state" "$dir/cache/archives/partial"
	: >>"$dir/status"
	sources >"$dir/sources.list.new"
	if [ "${1:-}" != force ] && [ -f "$dir/.updated" ] && cmp -s "$dir/sources.list.new" "$dir/sources.list"; then
		rm "$dir/sources.list.new"
		return
	fi
	mv "$dir/sources.list.new" "$dir/sources.list"
	say "apt: reading the index of $suite (private)"
	# A mirror that cannot be reached is an error, not a warning beside old indexes.
	apt-get "${apt_options[@]}" -qq --error-on=any update >&2
	touch "$dir/.updated"
}

version() { apt-cache "${apt_options[@]}" show --no-all-versions "$1" 2>/dev/null | awk '$1 == "Version:" && !seen++ { print $2 }'; }

# fetch DIR PKG…: an index older than the archive names files that are gone, so one renewal is right.
fetch() {
	local to=$1
	shift
	mkdir -p "$to"
	(cd "$to" && apt-get "${apt_options[@]}" -qq download "$@" >&2) && return
	prepare force
	(cd "$to" && apt-get "${apt_options[@]}" -qq download "$@" >&2)
}

case $action in
update) prepare force ;;
newest)
	prepare
	apt-cache "${apt_options[@]}" pkgnames "${2:-linux-image-}" | grep -E "$1" | sort -V | tail -1
	;;
version)
	prepare
	version "$1"
	;;
unpack)
	prepare
	to=$1
	shift
	debs=$(scratch)
	trap 'rm -rf "$debs"' EXIT
	fetch "$debs" "$@"
	mkdir -p "$to"
	for deb in "$debs"/*.deb; do dpkg -x "$deb" "$to"; done
	;;
source)
	prepare
	mkdir -p "$1"
	(cd "$1" && apt-get "${apt_options[@]}" -qq --download-only source "$2" >&2)
	;;
*) die "unknown action $action: update, newest, version, unpack or source" ;;
esac
