// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inNetNS runs f with a netlink handle in the namespace bound at path, the own
// one when path is empty. A namespace that is gone took everything in it along.
func inNetNS(path string, f func(h *netlink.Handle) error) error {
	if path == "" {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		defer h.Close()
		return f(h)
	}
	if err := onFilesystem(path, unix.NSFS_MAGIC); err != nil {
		// Missing, or the empty file that a namespace was once bound to.
		return nil
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return ignoreMissing(err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in %s: %w", path, err)
	}
	defer h.Close()
	return f(h)
}

// withLink runs f for a device; a device that does not exist is done.
func withLink(e Entry, f func(h *netlink.Handle, l netlink.Link) error) error {
	return inNetNS(e.NetNS, func(h *netlink.Handle) error {
		l, err := h.LinkByName(e.Name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find device: %w", err)
		}
		if err = f(h, l); errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	})
}

func removeLink(e Entry) error {
	return withLink(e, func(h *netlink.Handle, l netlink.Link) error {
		if err := h.LinkDel(l); err != nil {
			return fmt.Errorf("delete device: %w", err)
		}
		return nil
	})
}

func removeIngress(e Entry) error {
	return withLink(e, func(h *netlink.Handle, l netlink.Link) error {
		q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}}
		// EINVAL and ENOENT: there is no such qdisc.
		if err := h.QdiscDel(q); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete ingress qdisc: %w", err)
		}
		return nil
	})
}

func removeFilter(e Entry) error {
	return withLink(e, func(h *netlink.Handle, l netlink.Link) error {
		filters, err := h.FilterList(l, e.Parent)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("list filters: %w", err)
		}
		for _, f := range filters {
			if f.Attrs().Priority != e.Priority {
				continue
			}
			f.Attrs().Handle = 0 // the whole priority: a u32 filter alone leaves its hash table
			if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("delete filter: %w", err)
			}
		}
		return nil
	})
}

func removeQdisc(e Entry) error {
	return withLink(e, func(h *netlink.Handle, l netlink.Link) error {
		qdiscs, err := h.QdiscList(l)
		if err != nil {
			return fmt.Errorf("list qdiscs: %w", err)
		}
		for _, q := range qdiscs {
			if q.Attrs().Parent != netlink.HANDLE_ROOT || q.Attrs().Handle != e.Parent {
				continue
			}
			if err := h.QdiscDel(q); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("delete root qdisc: %w", err)
			}
		}
		return nil
	})
}

// removeNetNS unbinds a namespace. It lives on while processes are in it; those
// have entries of their own.
func removeNetNS(path string) error {
	if err := unmount(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return ignoreMissing(err)
	}
	return nil
}
