#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# `make kernel`: builds the small guest kernel from Debian's source package with
# images/kernel/kata.config, once for each source version and configuration:
#   kernel/linux-kata-<version>-<digest>/boot/vmlinux-<release>   ELF with a PVH entry, stripped
#                                       /lib/modules/<release>    no modules, the list of what is built in
#                                       /config, /version         configuration, version of the source package
#   kernel/small -> that directory, in which modules -> lib/modules/<release>
# The tree is that of an unpacked kernel package (scripts/kernel.sh), so what takes one takes the other.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/lib.sh"
dir=$KATA_CACHE/kernel
config=$here/../images/kernel/kata.config headers=$here/../images/kernel/headers.h

mkdir -p "$KATA_CACHE"
# One build at a time: a second one waits, and then finds it done.
exec 9>"$KATA_CACHE/.kernel.lock"
flock 9
version=$("$here/apt-private.sh" version "$KERNEL_SOURCE_SUITE" "$KERNEL_SOURCE")
[ -n "$version" ] || die "kernel: the Debian archive has no $KERNEL_SOURCE in $KERNEL_SOURCE_SUITE"
# The recipe's number is raised with a change below that changes the kernel.
digest=$({ echo "recipe 2, $KERNEL_BUILD_TIME"; cat "$config" "$headers"; } | sha256sum | cut -c 1-12)
name=linux-kata-$version-$digest
if current "$dir/$name" "$name"; then
	ln -sfn "$name" "$dir/small"
	exit 0
fi

install_packages gcc make flex bison bc libelf-dev binutils xz-utils
say "kernel: building $KERNEL_SOURCE $version (some 13 minutes of one core, once)"
# Not below tmp, which a set-up that runs beside this empties.
work=$dir/.build
trap 'rm -rf "$work"' EXIT
rm -rf "$work"
mkdir -p "$work"
"$here/apt-private.sh" unpack "$KERNEL_SOURCE_SUITE" "$work/package" "$KERNEL_SOURCE"
tarball=$work/package/usr/src/$KERNEL_SOURCE.tar.xz
[ -f "$tarball" ] || die "kernel: $KERNEL_SOURCE holds no usr/src/$KERNEL_SOURCE.tar.xz"
# Of other architectures and of the texts only what the configuration reads: a third of the tree stays packed.
excludes=(--wildcards '--exclude=*/Documentation/*/*' '--exclude=*/drivers/gpu/drm/amd/include/*')
for a in alpha arc arm arm64 csky hexagon loongarch m68k microblaze mips nios2 openrisc parisc powerpc riscv s390 sh sparc um xtensa; do
	excludes+=("--exclude=*/arch/$a/*.[chS]" "--exclude=*/arch/$a/*.dts*")
done
tar -xJf "$tarball" -C "$work" "${excludes[@]}"
rm -rf "$work/package"
src=$work/$KERNEL_SOURCE

# What depends on who builds when would make every build another kernel.
build() {
	make -s -C "$src" ARCH=x86_64 KCFLAGS=-w KBUILD_BUILD_USER=kata KBUILD_BUILD_HOST=kata KBUILD_BUILD_VERSION=1 \
		KBUILD_BUILD_TIMESTAMP="$KERNEL_BUILD_TIME" "$@"
}
fail() {
	tail -30 "$work/log" >&2
	die "kernel: the build failed; its last lines are above"
}
# precompile makes the compiler read images/kernel/headers.h once, not for each of 1,700 files, which
# halves the build. GCC takes what it has kept of headers only in place of the first one that the command
# line includes, and only if no macro of the command line is a name that it met in them. The build
# system defines the object's name there: it does so under other names now, from which the first header
# makes the usual ones. GCC itself refuses what it has kept for other options of the machine (vDSO, real mode);
# a file with options of its own, one that defines macros for the headers that it includes next, and the two
# that have names of their own which are also those headers' are compiled as ever.
first=include/linux/compiler-version.h
precompile() {
	cd "$src" || return
	local names=(KBUILD_BASENAME KBUILD_MODNAME KBUILD_MODFILE __KBUILD_MODNAME) own flags n
	own=$(find arch/x86 block crypto drivers fs init ipc kernel lib mm net security -name '*.c' -print0 | xargs -0 awk '
		FNR == 1 { defines = 0 }
		/^[ \t]*#[ \t]*define[ \t]/ && !/define[ \t]+((pr|dev)_fmt\(|CREATE_TRACE_POINTS)/ { defines = 1 }
		/^[ \t]*#[ \t]*include[ \t]*</ && defines { sub(/c$/, "o", FILENAME); print FILENAME; nextfile }' | tr '\n' ' ')
	sed -E -i -e '/^(basename|modname|modfile)_flags|-D__KBUILD_MODNAME/ s/-D((__)?KBUILD)/-DKATA_\1/' \
		-e 's/^basename_flags.*/& $(if $(filter $@,$(kata-own))$(CFLAGS_$(target-stem).o)$(CFLAGS_REMOVE_$(target-stem).o),-DKATA_OWN)/' \
		-e "\$ a kata-own := kernel/bpf/bpf_cgrp_storage.o lib/sort.o $own" scripts/Makefile.lib
	{
		echo '#ifndef __ASSEMBLY__'
		echo '#define KATA_(name) KATA_##name'
		for n in "${names[@]}"; do echo "#define $n KATA_($n)"; done
		echo '#endif'
	} >>"$first"
	{
		printf '#ifdef KATA_OWN\n#endif\n'
		printf '#define %s "kernel"\n' "${names[@]}"
		echo '#include <linux/kconfig.h>'
		cat "$headers"
		printf '#undef %s\n' "${names[@]}"
		echo '#include <linux/compiler-version.h>'
	} >"$work/headers.h"
	build fs/open.o || return
	flags=$(sed -n '1 { s/.*:= gcc //; s/-Wp,-MMD,[^ ]*//; s/-include [^ ]*//g; s/-D[^ ]*KBUILD_[^ ]*//g; s/ -c -o .*//; p }' fs/.open.o.cmd)
	eval "gcc $flags -x c-header -o $first.gch $work/headers.h"
}
build KCONFIG_ALLCONFIG="$config" allnoconfig >"$work/log" 2>&1 || fail
lost=$(awk 'NR == FNR { if (/^CONFIG_/) { split($0, a, "="); have[a[1]] = $0 } next }
	/^CONFIG_/ { split($0, a, "="); if (have[a[1]] != $0) print "  " $0 }
	/^# CONFIG_.* is not set$/ { if ($2 in have) print "  " $0 }' "$src/.config" "$config")
[ -z "$lost" ] || die "kernel: these lines of images/kernel/kata.config do not hold in the configuration that results (a dependency is missing, or the name has changed):
$lost"
(precompile) >"$work/log" 2>&1 || say "kernel: without compiled headers: $(tail -n 1 "$work/log")"
# Should another file not compile so, it does without.
if [ ! -e "$src/$first.gch" ] || ! build -k -j"$(nproc)" vmlinux >"$work/log" 2>&1; then
	rm -f "$src/$first.gch"
	build -j"$(nproc)" vmlinux >"$work/log" 2>&1 || fail
fi
times >"$work/times" # user and system time of this shell, then of its children
release=$(cat "$src/include/config/kernel.release")
readelf -n "$src/vmlinux" 2>/dev/null | grep -q 'Xen' || die "kernel: the built file has no PVH entry (an ELF note of Xen's)"
mkdir -p "$work/out/boot" "$work/out/lib/modules/$release"
strip -s -o "$work/out/boot/vmlinux-$release" "$src/vmlinux"
cp "$src/modules.builtin" "$work/out/lib/modules/$release/"
cp "$src/.config" "$work/out/config"
printf '%s\n' "$version" >"$work/out/version"
ln -s "lib/modules/$release" "$work/out/modules"
minutes=$(awk 'NR == 2 { split($1, u, /[ms]/); split($2, s, /[ms]/); printf "%.1f", u[1] + s[1] + (u[2] + s[2]) / 60 }' "$work/times")
replace "$work/out" "$dir/$name" "$name"
ln -sfn "$name" "$dir/small"
say "kernel: $release, $(stat -c %s "$dir/$name/boot/vmlinux-$release") bytes, $minutes minutes of CPU"
