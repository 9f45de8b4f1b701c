// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/typespb"
)

// inNamespace gives the test a network namespace of its own. Its thread stays
// locked, so it ends with the test's goroutine and the namespace with it.
func inNamespace(t *testing.T) *conn {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("network namespace (the tests run as root): %v", err)
	}
	nl, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nl.close)
	return nl
}

// addLink makes an interface: one end of a veth pair, since every kernel that
// runs containers has those. The kernel names the other end.
func addLink(nl *conn, name, mac string) error {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	msg := attr(ifInfo(0, 0, 0), unix.IFLA_IFNAME, append([]byte(name), 0))
	msg = attr(msg, unix.IFLA_ADDRESS, hw)
	msg = attr(msg, unix.IFLA_LINKINFO, attr(nil, unix.IFLA_INFO_KIND, []byte("veth")))
	_, err = nl.do(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, msg)
	return err
}

func addLinks(t *testing.T, nl *conn, nameMAC ...string) {
	t.Helper()
	for i := 0; i < len(nameMAC); i += 2 {
		if err := addLink(nl, nameMAC[i], nameMAC[i+1]); err != nil {
			t.Fatalf("link %s: %v", nameMAC[i], err)
		}
	}
}

const (
	mac1 = "02:00:00:00:00:01"
	mac2 = "02:00:00:00:00:02"
)

func TestConfigure(t *testing.T) {
	nl := inNamespace(t)
	addLinks(t, nl, "eth0", mac2, "tmp0", mac1) // the first is in the way of the other one's name
	cfg := Config{HotplugTimeout: time.Second}
	got, err := cfg.UpdateInterface(context.Background(), &typespb.Interface{
		Name: "eth0", HwAddr: mac1, Mtu: 1400,
		IPAddresses: []*typespb.IPAddress{{Address: "192.0.2.5", Mask: "24"}, {Family: typespb.IPFamily_v6, Address: "2001:db8::5", Mask: "64"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != "eth0" || got.HwAddr != mac1 || got.Mtu != 1400 || got.RawFlags&unix.IFF_UP == 0 {
		t.Errorf("interface %v", got)
	}
	routes, err := cfg.UpdateRoutes([]*typespb.Route{
		{Gateway: "192.0.2.1", Device: "eth0"},
		{Dest: "198.51.100.0/24", Device: "eth0", Scope: unix.RT_SCOPE_LINK, Mtu: 1300},
		{Dest: "2001:db8:1::/48", Gateway: "2001:db8::1", Device: "eth0", Family: typespb.IPFamily_v6},
	})
	if err != nil {
		t.Fatal(err)
	}
	has := func(f func(*typespb.Route) bool) bool { return slices.ContainsFunc(routes, f) }
	if !has(func(r *typespb.Route) bool { return r.Dest == "" && r.Gateway == "192.0.2.1" && r.Device == "eth0" }) ||
		!has(func(r *typespb.Route) bool { return r.Dest == "198.51.100.0/24" && r.Mtu == 1300 }) ||
		!has(func(r *typespb.Route) bool { return r.Dest == "2001:db8:1::/48" && r.Gateway == "2001:db8::1" }) {
		t.Errorf("routes %v", routes)
	}
	if err := cfg.AddNeighbors([]*typespb.ARPNeighbor{{ToIPAddress: &typespb.IPAddress{Address: "192.0.2.1"}, Device: "eth0", Lladdr: mac2, State: unix.NUD_PERMANENT}}); err != nil {
		t.Error(err)
	}
	// A second time, with less: what is not named goes.
	if _, err := cfg.UpdateInterface(context.Background(), &typespb.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: []*typespb.IPAddress{{Address: "192.0.2.6", Mask: "24"}}}); err != nil {
		t.Fatal(err)
	}
	routes, err = cfg.UpdateRoutes(nil)
	if err != nil || has(func(r *typespb.Route) bool { return r.Gateway != "" }) {
		t.Errorf("routes %v, %v", routes, err)
	}
	list, err := cfg.ListInterfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		if i.Name != "eth0" {
			continue
		}
		for _, a := range i.IPAddresses {
			if a.Address == "192.0.2.5" {
				t.Error("the old address stayed")
			}
		}
	}
	if stats, err := cfg.Stats(); err != nil || len(stats) != 4 {
		t.Errorf("stats %v, %v", stats, err)
	}
}

func TestByPCIPathSetsTheAddress(t *testing.T) {
	nl := inNamespace(t)
	addLinks(t, nl, "ens1", mac1)
	cfg := Config{HotplugTimeout: time.Second, ByPCI: func(_ context.Context, path string) (string, error) { return "ens1", nil }}
	got, err := cfg.UpdateInterface(context.Background(), &typespb.Interface{Name: "eth0", DevicePath: "02/00", HwAddr: mac2})
	if err != nil || got.HwAddr != mac2 || got.Name != "eth0" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestLinkThatComesLater(t *testing.T) {
	inNamespace(t)
	// The waiter's sockets are of this thread's namespace; the other thread joins it.
	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ns)
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		time.Sleep(30 * time.Millisecond) // the device is late; that is what is tested
		nl, err := open()
		if err == nil {
			err = addLink(nl, "late0", mac1)
			nl.close()
		}
		done <- err
	}()
	cfg := Config{HotplugTimeout: 5 * time.Second}
	got, err := cfg.UpdateInterface(context.Background(), &typespb.Interface{Name: "eth0", HwAddr: mac1})
	if e := <-done; e != nil {
		t.Fatal(e)
	}
	if err != nil || got.Name != "eth0" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestRefusals(t *testing.T) {
	inNamespace(t)
	cfg := Config{HotplugTimeout: 10 * time.Millisecond}
	for name, c := range map[string]struct {
		i    *typespb.Interface
		want fault.Kind
	}{
		"nothing":     {nil, fault.InvalidArgument},
		"long name":   {&typespb.Interface{Name: "a-very-long-name", HwAddr: mac1}, fault.InvalidArgument},
		"no identity": {&typespb.Interface{Name: "eth0"}, fault.InvalidArgument},
		"bad address": {&typespb.Interface{Name: "eth0", HwAddr: "x"}, fault.InvalidArgument},
		"absent":      {&typespb.Interface{Name: "eth0", HwAddr: mac1}, fault.NotFound},
	} {
		if _, err := cfg.UpdateInterface(context.Background(), c.i); fault.KindOf(err) != c.want || err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range map[string]*typespb.Route{
		"device": {Dest: "192.0.2.0/24", Device: "none"}, "dest": {Dest: "x", Device: "lo"},
		"gateway": {Gateway: "x", Device: "lo"}, "family": {Dest: "2001:db8::/32", Device: "lo"},
	} {
		if _, err := cfg.UpdateRoutes([]*typespb.Route{r}); err == nil || fault.KindOf(err) == fault.Internal {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMalformedAnswers(t *testing.T) {
	c := &conn{seq: 1}
	var out []message
	for _, b := range [][]byte{{}, {1, 0, 0, 0}, append(u32(99), make([]byte, 12)...), append(u32(3), make([]byte, 12)...)} {
		_, _ = c.collect(b, &out) // must not panic
		_ = attrs(b, 0)
	}
	if len(out) != 0 {
		t.Errorf("%v", out)
	}
}
