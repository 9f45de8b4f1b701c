// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
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

// TestClones: the first pod's shim makes the template, all others start from it.
func TestClones(t *testing.T) {
	o := labOptions(t)
	o.Kata.Set = map[string]string{"factory.enable_template": "true"}
	t.Setenv(lab.EnvTemplate, "") // a directory of the lab's own
	b := newOwnBox(t, o)
	b.start("first", nil, "sleep", "100000")
	b.waitLog(0, logTemplateMade)
	b.remove("first")
	for _, part := range []struct {
		name string
		test func(*box)
	}{
		{"ManyAtOnce", testManyClones},
		{"TemplateRemovedMeanwhile", testTemplateRemoved},
		{"Broken", testBrokenTemplates},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(begin(t, b.c)) })
	}
}

// manyClones is how many pods testManyClones has at a time; each needs a core for
// about a second without KVM.
const manyClones = 6

// testManyClones: guests of one template, at once, with a network, a volume and
// identities of their own, that leave the template as it was.
func testManyClones(b *box) {
	dir := b.TempDir()
	seen := len(b.c.Log())
	type answer struct{ random, uuid, boot, mac, address string }
	answers := make([]answer, manyClones)
	var wg sync.WaitGroup
	for i := range manyClones {
		id := fmt.Sprintf("clone%d", i)
		pod, _ := wired(b.T)
		volume := filepath.Join(dir, id)
		if err := os.Mkdir(volume, 0o755); err != nil {
			b.Fatal(err)
		}
		mac := strings.TrimSpace(pod.Exec("cat", "/sys/class/net/eth0/address"))
		b.Cleanup(func() { b.remove(id) })
		wg.Go(func() {
			flags := append(withNetNS(pod), "--detach", "--null-io", "--mount", "type=bind,src="+volume+",dst=/v,options=rbind:rw")
			r := b.ctr(b.runArgs(id, flags, []string{"sh", "-c", cloneReport + "sleep 100000"})...)
			if r.Code != 0 {
				b.Errorf("%s: %s", id, r.Stderr)
				return
			}
			got := strings.Fields(b.exec(id, "sh", "-c", "while ! [ -e /v/done ]; do sleep 0.1; done; cat /v/report").Stdout)
			if len(got) != 5 {
				b.Errorf("%s reports %q", id, got)
				return
			}
			answers[i] = answer{got[0], got[1], got[2], got[3], got[4]}
			if got[3] != mac {
				b.Errorf("%s has the hardware address %s, its namespace %s", id, got[3], mac)
			}
			if got[4] != "10.77.0.2/24" {
				b.Errorf("%s has the address %s", id, got[4])
			}
		})
	}
	wg.Wait()
	for i, x := range answers {
		for j, y := range answers[:i] {
			if x.random == y.random || x.uuid == y.uuid || x.boot == y.boot || x.mac == y.mac {
				b.Errorf("clones %d and %d share something: %+v, %+v", i, j, x, y)
			}
		}
		b.waitLog(seen, logCloned, fmt.Sprintf("sandbox=clone%d ", i))
	}
	b.wholeTemplate()
}

// cloneReport writes what two guests must never share, as the first thing that a
// workload does.
const cloneReport = `{
	head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'; echo
	cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address
	ip addr show eth0 | awk '/inet / {print $2}'
} >/v/report; touch /v/done; `

// testTemplateRemoved: clones do not need the template any more.
func testTemplateRemoved(b *box) {
	kept := filepath.Join(b.TempDir(), "kept")
	dir := b.template()
	b.start("orphan", nil, "sleep", "100000")
	if err := os.Rename(dir, kept); err != nil {
		b.Fatal(err)
	}
	b.want(b.exec("orphan", "sh", "-c", "head -c 1000000 /dev/zero | md5sum"), 0, "879f4bba57ed37c9ec5e5aedf9864698  -\n")
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
	}{
		{"truncated", before["state"][:len(before["state"])/2], false},
		{"refused", []byte("not what QEMU saves"), true},
	} {
		write("state", broken.state)
		if broken.match {
			write("manifest.json", forge(b.T, before["manifest.json"], broken.state))
		}
		seen := len(b.c.Log())
		b.want(b.run(broken.name, nil, "echo", "hi"), 0, "hi\n")
		b.waitLog(seen, "level=WARN", logBooting, "sandbox="+broken.name+" ")
		for name, content := range before {
			write(name, content)
		}
	}
	b.wholeTemplate()
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
