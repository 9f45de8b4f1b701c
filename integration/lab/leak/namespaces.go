// SPDX-License-Identifier: Apache-2.0

package leak

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// byNamespace groups processes by one of their namespaces; pids ascend.
func (s *State) byNamespace(of func(proc) string) map[string][]int {
	groups := map[string][]int{}
	for pid, p := range s.procs {
		if ns := of(p); ns != "" {
			groups[ns] = append(groups[ns], pid)
		}
	}
	for _, pids := range groups {
		sort.Ints(pids)
	}
	return groups
}

// mounts collects every mount of every mount namespace that a process is in.
// Those of our own namespace stay by themselves, others die with their processes.
func (s *State) mounts() error {
	own := s.procs[os.Getpid()].mntNS
	for ns, pids := range s.byNamespace(func(p proc) string { return p.mntNS }) {
		data, err := readOfAny(pids, "mountinfo")
		if err != nil {
			return fmt.Errorf("mounts of %s: %w", ns, err)
		}
		holders := pids
		where := fmt.Sprintf(" in %s of process %d", ns, pids[0])
		if ns == own {
			holders, where = nil, ""
		}
		for line := range strings.Lines(data) {
			// proc_pid_mountinfo(5): id parent major:minor root point options … - type source
			head, tail, _ := strings.Cut(line, " - ")
			f, g := strings.Fields(head), strings.Fields(tail)
			if len(f) < 6 || len(g) < 2 {
				continue
			}
			what := fmt.Sprintf("%s (%s %s, root %s)%s", f[4], g[0], g[1], f[3], where)
			s.add(ns+" "+f[0]+" "+f[4], item{class: Mount, what: what, path: f[4], holders: holders})
		}
	}
	return nil
}

// readOfAny reads a file of the first process that is still there.
func readOfAny(pids []int, file string) (string, error) {
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err == nil {
			return string(data), nil
		}
		// A process that has no mount namespace any more answers EINVAL.
		if !gone(err) && !errors.Is(err, unix.EINVAL) {
			return "", err
		}
	}
	return "", nil
}

// network collects network namespaces, their links and their traffic control.
func (s *State) network() error {
	type place struct {
		path    string
		holders []int
	}
	found := map[string]place{}
	groups := s.byNamespace(func(p proc) string { return p.netNS })
	for ns, pids := range groups {
		found[ns] = place{fmt.Sprintf("/proc/%d/ns/net", pids[0]), pids}
	}
	for pid, p := range s.procs {
		for _, ns := range p.netNSFDs {
			if _, ok := found[ns]; !ok {
				found[ns] = place{"", []int{pid}}
			}
		}
	}
	for path, ns := range boundNetNS() {
		found[ns] = place{path, nil}
	}
	for ns, p := range found {
		what := ns + " at " + p.path
		if p.path == "" {
			what = fmt.Sprintf("%s held by a descriptor of process %d", ns, p.holders[0])
		}
		s.add(ns, item{class: NetNS, what: what, path: p.path, holders: p.holders})
		if p.path == "" {
			continue
		}
		if err := s.links(ns, p.path, p.holders); err != nil && !gone(err) {
			return fmt.Errorf("links of %s: %w", what, err)
		}
	}
	return nil
}

// boundNetNS maps mount point to network namespace for those that are bound to a
// file in our mount namespace.
func boundNetNS() map[string]string {
	bound := map[string]string{}
	data, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) > 5 && strings.HasPrefix(f[3], "net:[") {
			bound[f[4]] = f[3]
		}
	}
	return bound
}

func (s *State) links(ns, path string, holders []int) error {
	fd, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	defer fd.Close()
	h, err := netlink.NewHandleAt(fd, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		a := l.Attrs()
		if a.Name == "lo" {
			continue // comes and goes with its namespace
		}
		name := fmt.Sprintf("%s (%s, index %d) in %s", a.Name, l.Type(), a.Index, ns)
		s.add(fmt.Sprintf("%s %d %s", ns, a.Index, a.Name), item{class: Link, what: name, holders: holders})
		if err := s.tc(h, l, ns, name, holders); err != nil {
			return err
		}
	}
	return nil
}

// tc collects queueing disciplines and the filters on them.
func (s *State) tc(h *netlink.Handle, l netlink.Link, ns, name string, holders []int) error {
	qdiscs, err := h.QdiscList(l)
	if err != nil {
		return err
	}
	index := strconv.Itoa(l.Attrs().Index)
	for _, q := range qdiscs {
		a := q.Attrs()
		s.add(fmt.Sprintf("%s %s qdisc %s %x %x", ns, index, q.Type(), a.Handle, a.Parent),
			item{class: TC, what: fmt.Sprintf("qdisc %s %s on %s", q.Type(), netlink.HandleStr(a.Handle), name), holders: holders})
		parents := []uint32{a.Handle}
		if a.Parent == netlink.HANDLE_CLSACT {
			parents = append(parents, netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS)
		}
		for _, parent := range parents {
			filters, err := h.FilterList(l, parent)
			if err != nil {
				return fmt.Errorf("filters of %s: %w", name, err)
			}
			for _, f := range filters {
				fa := f.Attrs()
				s.add(fmt.Sprintf("%s %s filter %s %x %x %d", ns, index, f.Type(), parent, fa.Handle, fa.Priority),
					item{class: TC, what: fmt.Sprintf("filter %s %s on %s", f.Type(), netlink.HandleStr(fa.Handle), name), holders: holders})
			}
		}
	}
	return nil
}

// sockets collects Unix sockets that have a name, in every network namespace. A
// connection carries its listener's name, so names count, not sockets.
func (s *State) sockets() error {
	holders := map[string][]int{}
	for pid, p := range s.procs {
		for _, inode := range p.sockets {
			holders[inode] = append(holders[inode], pid)
		}
	}
	for ns, pids := range s.byNamespace(func(p proc) string { return p.netNS }) {
		data, err := readOfAny(pids, "net/unix")
		if err != nil {
			return fmt.Errorf("sockets of %s: %w", ns, err)
		}
		for line := range strings.Lines(data) {
			// Num RefCount Protocol Flags Type St Inode Path; an abstract name starts with @.
			f := strings.SplitN(strings.Join(strings.Fields(line), " "), " ", 8)
			if len(f) < 8 || f[0] == "Num" {
				continue
			}
			key := string(Socket) + " " + ns + " " + f[7]
			i := s.items[key]
			i.class, i.what, i.path = Socket, f[7]+" in "+ns, f[7]
			i.holders = append(i.holders, holders[f[6]]...)
			s.items[key] = i
		}
	}
	return nil
}
