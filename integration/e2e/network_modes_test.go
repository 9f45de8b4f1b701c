// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// configured are the flags for a copy of the lab's configuration with other
// values: "section key value" each.
func (b *box) configured(values ...string) []string {
	b.Helper()
	text := readFile(b.T, b.c.ConfigFile())
	for _, v := range values {
		f := strings.SplitN(v, " ", 3)
		if !strings.Contains(text, "["+f[0]+"]\n") {
			text += "[" + f[0] + "]\n"
		}
		text = setKey(text, f[0], f[1], f[2])
	}
	return []string{"--runtime-config-path", writeFile(b.T, text, b.TempDir(), "kata.toml")}
}

// unchanged checks that a namespace is as it was, or is soon: containerd cleans up
// after a killed shim in the background.
func (b *box) unchanged(n *lab.NetNS, before string) {
	b.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	after := n.State()
	for limit := time.Now().Add(leak.SettleTime); after != before && time.Now().Before(limit); after = n.State() {
		<-tick.C
	}
	if after != before {
		b.Errorf("the namespace is not as it was:\n%s\nbefore:\n%s", after, before)
	}
}

func TestNetworkMacvtap(t *testing.T) {
	b := newBox(t)
	pod, outside := wired(t)
	server(outside, "198.51.100.1")
	before := pod.State()
	b.start("net", append(withNetNS(pod), b.configured(`runtime internetworking_model "macvtap"`)...), "sleep", "1000")
	b.greeted("net", "198.51.100.1", "10.77.0.2")
	outside.Exec("busybox", "ping", "-c", "1", "-W", "5", "10.77.0.2")
	b.same("net", "cat /sys/class/net/eth0/address", pod.Exec("cat", "/sys/class/net/eth0/address"))
	b.remove("net")
	b.unchanged(pod, before)
}

func TestNetworkNone(t *testing.T) {
	b := newBox(t)
	pod, _ := wired(t)
	before := pod.State()
	b.start("net", append(withNetNS(pod), b.configured(`runtime internetworking_model "none"`)...), "sleep", "1000")
	b.unchanged(pod, before)
	b.same("net", "ls /sys/class/net", "lo")
	b.remove("net")
	b.unchanged(pod, before)
}

// TestNetworkRefused: what a machine cannot have is named, and nothing is done.
func TestNetworkRefused(t *testing.T) {
	b := newBox(t)
	refuse := func(what string, n *lab.NetNS, flags []string, words ...string) {
		t.Helper()
		before := n.State()
		b.refused(what, b.run("refused", append(withNetNS(n), flags...), "true"), words...)
		b.unchanged(n, before)
	}
	pod, outside := wired(t)
	outside.IP("link", "set", "host0", "mtu", "65535")
	pod.IP("link", "set", "eth0", "mtu", "65535")
	refuse("an MTU that no tap has", pod, nil, "eth0", "65535", "MTU")
	pod.IP("link", "set", "eth0", "mtu", "1500")
	pod.Veth("net1", outside, "host1")
	pod.Addr("net1", "10.77.0.9/24")
	refuse("overlapping routes", pod, nil, "overlapping routes", "10.77.0.0/24", "eth0", "net1")
	empty := lab.NewNetNS(t)
	refuse("no device", empty, []string{"--annotation", "io.kubernetes.cri.container-type=sandbox"}, empty.Path, "no network device")
	other, _ := wired(t)
	other.IP("tuntap", "add", "dev", "tun0", "mode", "tun")
	other.IP("link", "set", "tun0", "up")
	other.Addr("tun0", "10.80.0.1/24")
	refuse("a device without Ethernet", other, nil, "tun0", "Ethernet")
}

// TestNetworkLate: a container without a namespace of its own is wired after its
// creation, into the namespace of the task's process, as Docker does.
func TestNetworkLate(t *testing.T) {
	b := newBox(t)
	outside := lab.NewNetNS(t)
	server(outside, "198.51.100.1")
	b.start("late", nil, "sleep", "1000")
	pid := b.taskPID("late")
	outside.IP("link", "add", "host0", "type", "veth", "peer", "name", "eth0", "netns", pid)
	outside.Addr("host0", "10.77.0.1/24")
	outside.IP("link", "set", "host0", "up")
	in := func(args ...string) {
		t.Helper()
		outside.Exec(append([]string{"nsenter", "-t", pid, "-n", "ip"}, args...)...)
	}
	in("addr", "add", "10.77.0.2/24", "dev", "eth0")
	in("link", "set", "eth0", "up")
	in("route", "add", "default", "via", "10.77.0.1")
	b.eventually("late", "ip route | grep -c default", "1")
	b.greeted("late", "198.51.100.1", "10.77.0.2")
	b.remove("late")
}

// taskPID is a task's process on the host.
func (b *box) taskPID(id string) string {
	b.Helper()
	for line := range strings.Lines(b.ok("tasks", "ls")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == id {
			return f[1]
		}
	}
	b.Fatalf("no task %s", id)
	return ""
}

// TestNetworkRates: with two queue pairs and limits each way, a stream is whole
// and not faster than it may be.
func TestNetworkRates(t *testing.T) {
	b := newBox(t)
	pod, outside := wired(t)
	before := pod.State()
	const size, rate = 2 << 20, 8_000_000 // bytes, bits per second
	b.start("net", append(withNetNS(pod), b.configured("hypervisor.qemu default_vcpus 2", "hypervisor.qemu default_maxvcpus 2",
		fmt.Sprintf("hypervisor.qemu rx_rate_limiter_max_rate %d", rate), fmt.Sprintf("hypervisor.qemu tx_rate_limiter_max_rate %d", rate))...), "sleep", "1000")
	b.same("net", "ls -d /sys/class/net/eth0/queues/tx-* | wc -l", "2")
	least := time.Duration(float64(size-(256<<10)) * 8 / rate * float64(time.Second))
	for _, d := range []struct {
		name, script string
		serve        func(io.ReadWriter) (int64, error)
	}{
		{"sent", fmt.Sprintf("head -c %d /dev/zero | nc 10.77.0.1 5001", size), func(c io.ReadWriter) (int64, error) { return io.Copy(io.Discard, c) }},
		{"received", "nc 10.77.0.1 5001 </dev/null | wc -c", func(c io.ReadWriter) (int64, error) {
			return io.Copy(c, io.LimitReader(zeroes{}, size))
		}},
	} {
		l := outside.Listen("10.77.0.1:5001")
		done := make(chan string, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				done <- err.Error()
				return
			}
			begin := time.Now()
			n, err := d.serve(c)
			c.Close()
			took := time.Since(begin)
			t.Logf("%d bytes %s in %v", n, d.name, took)
			if err != nil || n != size || d.name == "sent" && took < least {
				done <- fmt.Sprintf("%d bytes %s in %v, %v; want %d in at least %v", n, d.name, took, err, size, least)
			}
			close(done)
		}()
		begin := time.Now()
		out := b.shell("net", d.script)
		if d.name == "received" && (out != fmt.Sprint(size) || time.Since(begin) < least) {
			t.Errorf("the container received %s bytes in %v; want %d in at least %v", out, time.Since(begin), size, least)
		}
		if problem := <-done; problem != "" {
			t.Error(problem)
		}
		l.Close()
	}
	b.remove("net")
	b.unchanged(pod, before)
}

type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestNetworkShimKilled: what a killed shim left in the namespace goes with the
// deletion of its task.
func TestNetworkShimKilled(t *testing.T) {
	b := newBox(t)
	pod, outside := wired(t)
	before := pod.State()
	b.start("net", withNetNS(pod), "sleep", "1000")
	// A stream without limits, for the record: busybox's httpd uses sendfile.
	const size = 32 << 20
	b.shell("net", fmt.Sprintf("head -c %d /dev/zero >/dev/shm/f; httpd -p 80 -h /dev/shm", size))
	c := outside.Dial("10.77.0.2:80")
	begin := time.Now()
	if _, err := io.WriteString(c, "GET /f HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, c)
	t.Logf("%d bytes, %.1f MB/s", n, float64(n)/1e6/time.Since(begin).Seconds())
	if err != nil || n < size {
		t.Errorf("received %d bytes, %v; want %d and a header", n, err, size)
	}
	if err := syscall.Kill(b.shimOf("net"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.remove("net")
	b.unchanged(pod, before)
}

// cniPlugins is where Debian's containernetworking-plugins puts them.
const cniPlugins = "/usr/lib/cni"

// TestNetworkCNI: the real bridge plugin wires a pod, with another namespace as its host.
func TestNetworkCNI(t *testing.T) {
	b := newBox(t)
	pod, host := lab.NewNetNS(t), lab.NewNetNS(t)
	conf := fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "net", "type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1420,
		"ipam": {"type": "host-local", "dataDir": %q, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
			"ranges": [[{"subnet": "10.81.0.0/24"}], [{"subnet": "2001:db8:81::/64"}]]}}`, t.TempDir())
	file := writeFile(t, conf, t.TempDir(), "net.conf")
	cni := func(command string) {
		t.Helper()
		host.Exec("env", "CNI_COMMAND="+command, "CNI_CONTAINERID=pod", "CNI_NETNS="+pod.Path, "CNI_IFNAME=eth0", "CNI_PATH="+cniPlugins,
			"sh", "-c", "exec "+cniPlugins+"/bridge <"+file)
	}
	cni("ADD")
	before := pod.State()
	b.start("net", withNetNS(pod), "sleep", "1000")
	b.same("net", "ping -c 1 -W 5 10.81.0.1 >/dev/null && ping -c 1 -W 5 2001:db8:81::1 >/dev/null; echo $?; cat /sys/class/net/eth0/mtu", "0\n1420")
	b.remove("net")
	b.unchanged(pod, before)
	cni("DEL")
}
