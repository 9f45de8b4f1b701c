// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// Words of the shim's log lines about templates.
const (
	logMaking       = `msg="making a template"`
	logTemplateMade = `msg="template made"`
	logCloned       = "msg=cloned"
	logBooting      = "booting instead"
)

// waitLog waits for a line of the shims, after the first seen ones, that holds all words.
func (b *box) waitLog(seen int, words ...string) string {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	line, err := b.c.WaitLog(ctx, func(l string) bool {
		if seen--; seen >= 0 {
			return false
		}
		for _, w := range words {
			if !strings.Contains(l, w) {
				return false
			}
		}
		return true
	})
	if err != nil {
		b.Fatalf("%q: %v", words, err)
	}
	return line
}

// template is the directory of the lab's only template.
func (b *box) template() string {
	b.Helper()
	all, err := filepath.Glob(filepath.Join(b.c.TemplatesDir(), "*", "manifest.json"))
	if err != nil || len(all) != 1 {
		b.Fatalf("templates %v, %v: want one", all, err)
	}
	return filepath.Dir(all[0])
}

// wholeTemplate compares the template with what was saved.
func (b *box) wholeTemplate() {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if out, err := b.c.KataCtl(ctx, "template", "status"); err != nil || !strings.Contains(out, "whole") {
		b.Errorf("kata-ctl template status: %v: %s", err, out)
	}
}

// TestClones: the first pod's shim makes the template, all others start from it,
// whether their root is a disk of their own or comes by virtio-fs.
func TestClones(t *testing.T) {
	o := labOptions(t)
	o.Snapshotter = "erofs"
	o.Kata.Set = map[string]string{"factory.enable_template": "true"}
	t.Setenv(lab.EnvTemplate, "") // a directory of the lab's own
	b := newOwnBox(t, o)
	b.start("brief", nil, "sleep", "100000")
	b.waitLog(0, logMaking)
	b.remove("brief") // which ends the making
	if left, err := filepath.Glob(filepath.Join(b.c.TemplatesDir(), ".new-*")); err != nil || len(left) > 0 {
		b.Errorf("what was begun is left: %v, %v", left, err)
	}
	// Of another size than others, and a limit that does not hold for the making.
	b.start("first", []string{"--cpus", "1", "--memory-limit", fmt.Sprint(32 * mib)}, "sleep", "100000")
	b.waitLog(0, logTemplateMade)
	b.remove("first")
	for _, part := range []struct {
		name string
		test func(*box)
	}{
		{"ManyAtOnce", testManyClones},
		{"TemplateRemovedMeanwhile", testTemplateRemoved},
		{"Broken", testBrokenTemplates},
		{"Meanwhile", testHarmMeanwhile},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(begin(t, b.c)) })
	}
	if os.Getenv(allEnv) != "" {
		t.Run("Crowd", func(t *testing.T) { testCrowd(begin(t, b.c)) })
	}
}

// crowd is how many idle clones there are at once, at most crowdStarts of which
// start at a time.
const (
	crowd       = 64
	crowdStarts = 4
)

// testCrowd: as many clones as nobody has booted machines.
func testCrowd(b *box) {
	var wg sync.WaitGroup
	begun := make(chan struct{}, crowdStarts)
	ids := make([]string, crowd)
	for i := range ids {
		ids[i] = fmt.Sprint("idle", i)
		b.Cleanup(func() { b.remove(ids[i]) })
		begun <- struct{}{}
		wg.Go(func() {
			defer func() { <-begun }()
			if r := b.ctr(b.runArgs(ids[i], []string{"--detach", "--null-io"}, []string{"sleep", "100000"})...); r.Code != 0 {
				b.Errorf("%s: %s", ids[i], r.Stderr)
			}
		})
	}
	wg.Wait()
	tasks := b.ok("tasks", "ls")
	if n := strings.Count(tasks, "RUNNING"); n != crowd {
		b.Fatalf("%d of %d run:\n%s", n, crowd, tasks)
	}
	b.want(b.exec(ids[0], "echo", "alive"), 0, "alive\n")
	b.want(b.exec(ids[crowd-1], "echo", "alive"), 0, "alive\n")
	b.wholeTemplate()
}

// manyClones is how many pods testManyClones has at a time; each needs a core for
// about a second without KVM. With allEnv there are as many as allClones.
const (
	manyClones = 6
	allClones  = 20
	allEnv     = bulkEnv
)

// clone is what a pod of testManyClones is, and what it has said of itself.
type clone struct {
	id, volume string
	mac        string // of its devices, in one line
	memory     int64  // limit in bytes
	cpus       int    // limit

	random, uuid, boot, gotMAC, address string
	gotCPUs, gotMiB                     int
}

// cloneReport writes what two guests must never share as the first thing that a
// workload does, and then the machine's size.
const cloneReport = `{
	head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'; echo
	cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id
	cat /sys/class/net/eth0/address /sys/class/net/net1/address 2>/dev/null | xargs | tr ' ' ,
	ip addr show eth0 | awk '/inet / {print $2}'
	nproc; awk '/MemTotal/ {print $2}' /proc/meminfo
} >/report; [ ! -d /v ] || cp /report /v/; touch /done; `

// newClone plans the i-th of them: with another size than the one before, every
// other with a volume, which needs virtio-fs, those between with a second network device.
func newClone(b *box, i int) (*clone, []string) {
	pod, outside := wired(b.T)
	c := &clone{id: fmt.Sprintf("clone%d", i), memory: int64(32+48*(i%5)) * mib, cpus: i % 3 % 2}
	devices := []string{"/sys/class/net/eth0/address"}
	if i%2 == 0 {
		pod.Veth("net1", outside, "host1")
		devices = append(devices, "/sys/class/net/net1/address")
	}
	c.mac = strings.Join(strings.Fields(pod.Exec(append([]string{"cat"}, devices...)...)), ",")
	flags := append(withNetNS(pod), "--detach", "--null-io", "--memory-limit", fmt.Sprint(c.memory))
	if c.cpus > 0 {
		flags = append(flags, "--cpus", fmt.Sprint(c.cpus))
	}
	if i%2 > 0 {
		c.volume = filepath.Join(b.TempDir(), c.id)
		if err := os.Mkdir(c.volume, 0o755); err != nil {
			b.Fatal(err)
		}
		flags = append(flags, "--mount", "type=bind,src="+c.volume+",dst=/v,options=rbind:rw")
	}
	return c, flags
}

// start runs the pod and reads its report.
func (c *clone) start(b *box, flags []string) error {
	r := b.ctr(b.runArgs(c.id, flags, []string{"sh", "-c", cloneReport + "sleep 100000"})...)
	if r.Code != 0 {
		return fmt.Errorf("%s: %s", c.id, r.Stderr)
	}
	r = b.exec(c.id, "sh", "-c", "while ! [ -e /done ]; do sleep 0.1; done; cat /report")
	if _, err := fmt.Sscan(r.Stdout, &c.random, &c.uuid, &c.boot, &c.gotMAC, &c.address, &c.gotCPUs, &c.gotMiB); err != nil {
		return fmt.Errorf("%s reports %q, %s: %w", c.id, r.Stdout, r.Stderr, err)
	}
	c.gotMiB >>= 10
	if c.volume == "" {
		return nil
	}
	if onHost, err := os.ReadFile(filepath.Join(c.volume, "report")); err != nil || string(onHost) != r.Stdout {
		return fmt.Errorf("%s: its volume holds %q, %w; want %q", c.id, onHost, err, r.Stdout)
	}
	return nil
}

// testManyClones: guests of one template, at once, with networks, volumes, sizes
// and identities of their own, that leave the template as it was.
func testManyClones(b *box) {
	n := manyClones
	if os.Getenv(allEnv) != "" {
		n = allClones
	}
	seen := len(b.c.Log())
	clones := make([]*clone, n)
	var wg sync.WaitGroup
	for i := range clones {
		c, flags := newClone(b, i)
		clones[i] = c
		b.Cleanup(func() { b.remove(c.id) })
		wg.Go(func() {
			if err := c.start(b, flags); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	if b.Failed() {
		return
	}
	template := filepath.Base(b.template())
	for i, x := range clones {
		if x.gotMAC != x.mac || x.address != "10.77.0.2/24" {
			b.Errorf("%s has the addresses %s, %s; its namespace %s", x.id, x.gotMAC, x.address, x.mac)
		}
		if more := int(x.memory-clones[0].memory) / mib; !near(x.gotMiB, clones[0].gotMiB, more) {
			b.Errorf("%s has %d MiB; want %d MiB more than the %d of the first", x.id, x.gotMiB, more, clones[0].gotMiB)
		}
		if want := clones[0].gotCPUs + x.cpus - clones[0].cpus; x.gotCPUs != want {
			b.Errorf("%s has %d CPUs; want %d", x.id, x.gotCPUs, want)
		}
		for _, y := range clones[:i] {
			if x.random == y.random || x.uuid == y.uuid || x.boot == y.boot || x.mac == y.mac {
				b.Errorf("%s and %s share something: %+v, %+v", x.id, y.id, x, y)
			}
		}
		b.waitLog(seen, logCloned, "sandbox="+x.id+" ", "template="+template+" ", fmt.Sprintf("shared=%v ", x.volume == ""))
	}
	b.wholeTemplate()
}

// testTemplateRemoved: clones do not need the template any more.
func testTemplateRemoved(b *box) {
	kept := filepath.Join(b.TempDir(), "kept")
	dir := b.template()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	b.start("orphan", nil, "sleep", "100000")
	if err := os.Rename(dir, kept); err != nil {
		b.Fatal(err)
	}
	b.want(b.exec("orphan", "sh", "-c", "head -c 1000000 /dev/zero | md5sum"), 0, "879f4bba57ed37c9ec5e5aedf9864698  -\n")
	// A clone's memory is not its own: it is not saved, and goes on.
	saved := filepath.Join(b.TempDir(), "saved")
	if out, err := b.c.KataCtl(ctx, "checkpoint", "orphan", saved); err == nil || !strings.Contains(out, "enable_checkpoint") {
		b.Errorf("kata-ctl checkpoint of a clone: %v: %s; want it refused with the reason", err, out)
	}
	if _, err := os.Stat(saved); !errors.Is(err, os.ErrNotExist) {
		b.Errorf("a refused checkpoint leaves its directory: %v", err)
	}
	b.want(b.exec("orphan", "echo", "alive"), 0, "alive\n")
	b.remove("orphan")
	if err := os.Rename(kept, dir); err != nil {
		b.Fatal(err)
	}
}

// testBrokenTemplates: a template that is of no use costs a boot, not the pod.
func testBrokenTemplates(b *box) {
	dir := b.template()
	before := map[string][]byte{}
	for _, name := range []string{"state", "manifest.json"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			b.Fatal(err)
		}
		before[name] = content
	}
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o400); err != nil {
			b.Fatal(err)
		}
	}
	for _, broken := range []struct {
		name  string
		state []byte
		match bool // the manifest says that this is what was saved
		flags []string
	}{
		{"truncated", before["state"][:len(before["state"])/2], false, nil},
		{"refused", []byte("not what QEMU saves"), true, []string{"--mount", "type=bind,src=" + b.TempDir() + ",dst=/v,options=rbind:rw"}},
	} {
		write("state", broken.state)
		if broken.match {
			write("manifest.json", forge(b.T, before["manifest.json"], broken.state))
		}
		seen := len(b.c.Log())
		b.want(b.run(broken.name, broken.flags, "echo", "hi"), 0, "hi\n")
		b.waitLog(seen, "level=WARN", logBooting, "sandbox="+broken.name+" ")
		for name, content := range before {
			write(name, content)
		}
	}
	b.wholeTemplate()
}

// testHarmMeanwhile: a template that is removed, or changed, while pods start from
// it costs some of them a boot. It is made again afterwards.
func testHarmMeanwhile(b *box) {
	dir := b.template()
	kept := filepath.Join(b.TempDir(), "kept")
	b.harmed("removed", func() error { return os.Rename(dir, kept) })
	// A pod that booted may have made it again.
	if err := errors.Join(os.RemoveAll(dir), os.Rename(kept, dir)); err != nil {
		b.Fatal(err)
	}
	b.wholeTemplate()
	b.harmed("emptied", func() error { return os.Truncate(filepath.Join(dir, "memory"), 4096) })
	seen := len(b.c.Log())
	b.start("again", nil, "sleep", "100000")
	b.waitLog(seen, logTemplateMade)
	b.wholeTemplate()
}

// harmed starts pods at once and does harm when the first of them has its machine.
func (b *box) harmed(name string, harm func() error) {
	b.Helper()
	seen := len(b.c.Log())
	var wg sync.WaitGroup
	for i := range 3 {
		id := fmt.Sprint(name, i)
		flags := []string{"--rm"}
		if i%2 > 0 {
			flags = append(flags, "--mount", "type=bind,src="+b.TempDir()+",dst=/v,options=rbind:rw")
		}
		wg.Go(func() {
			if r := b.ctr(b.runArgs(id, flags, []string{"echo", id})...); r.Code != 0 || r.Stdout != id+"\n" {
				b.Errorf("%s: status %d, %q, %s", id, r.Code, r.Stdout, r.Stderr)
			}
		})
	}
	b.waitLog(seen, logCloned)
	if err := harm(); err != nil {
		b.Error(err)
	}
	wg.Wait()
}

// forge makes a manifest fit another state.
func forge(t *testing.T, manifest, state []byte) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(manifest, &m); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(state)
	m["state_sha256"], m["state_bytes"] = hex.EncodeToString(sum[:]), len(state)
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
