/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Headers that scripts/kernel-build.sh compiles once for the whole kernel, because
 * reading them again for each file took half of the build. What most files include,
 * or what the many of the network do. One that is missing here costs time, no more.
 */
#include <linux/compiler_types.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/mm.h>
#include <linux/fs.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/interrupt.h>
#include <linux/seq_file.h>
#include <linux/proc_fs.h>
#include <linux/cgroup.h>
#include <linux/memcontrol.h>
#include <linux/writeback.h>
#include <linux/blkdev.h>
#include <linux/pagemap.h>
#include <linux/security.h>
#include <linux/syscalls.h>
#include <linux/poll.h>
#include <linux/bpf.h>
#include <linux/pci.h>
#include <linux/netdevice.h>
#include <net/sock.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/tcp.h>
#include <net/netlink.h>
#include <net/net_namespace.h>
