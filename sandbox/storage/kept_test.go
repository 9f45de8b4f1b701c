// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/hypervisor"
)

// TestKeptDisks: what a machine has at its save is what a restored one gets, disk
// by disk; containers that take over hold what the saved ones held.
func TestKeptDisks(t *testing.T) {
	ctx, vm, d := context.Background(), newPlugVM(), NewDisks()
	before := len(openFiles(t))
	d.Keep()
	for _, b := range d.Boot("a", []*Source{source(t, d, "one")}) {
		b.Close()
	}
	d.Booted([]string{"p0"}, nil)
	for _, a := range []struct{ user, name string }{{"a", "one"}, {"b", "one"}, {"b", "two"}, {"c", "three"}} {
		if _, err := d.Attach(ctx, vm, a.user, source(t, d, a.name)); err != nil {
			t.Fatal(err)
		}
	}
	must(t, d.Release(ctx, vm, "c"))
	kept, err := d.Kept()
	must(t, err)
	var all []string
	for _, k := range kept {
		all = append(all, k.ID+" at "+k.Place+" of "+strings.Join(k.Users, ","))
		data, err := io.ReadAll(k.Parts[0].File)
		if must(t, err); string(data) != "x" {
			t.Errorf("%s holds %q", k.ID, data)
		}
	}
	if got, want := strings.Join(all, "; "), "disk0 at p0 of a,b; disk1 at place of disk1 of b"; got != want {
		t.Errorf("kept: %s; want %s", got, want)
	}
	if got := strings.Join(d.Held("a"), " ") + "; " + strings.Join(d.Held("b"), " "); got != "disk0; disk0 disk1" {
		t.Errorf("held: %s", got)
	}
	d.LetGo()
	d.LetGo()
	if now := len(openFiles(t)); now != before {
		t.Errorf("%d files are open, %d before", now, before)
	}

	again := NewDisks()
	for i := range kept {
		kept[i].Parts = source(t, again, "one").Parts
		kept[i].Users = []string{"saved"}
	}
	boot := again.Restore(kept)
	again.Booted([]string{"p0", "p1"}, nil)
	for i, b := range boot {
		if b.ID != kept[i].ID || b.Place != kept[i].Place {
			t.Errorf("%+v is restored as %+v", kept[i].Disk, b)
		}
		b.Close()
	}
	vm = newPlugVM()
	if place, err := again.Attach(ctx, vm, "new", source(t, again, "one")); err != nil || place != "place of disk2" {
		t.Errorf("a disk of the same file in a restored pod: %q, %v; want one of its own", place, err)
	}
	again.Pass("saved", "taken")
	if got := strings.Join(again.Held("taken"), " "); got != "disk0 disk1" || again.Held("saved") != nil {
		t.Errorf("taken over: %s, left %v", got, again.Held("saved"))
	}
	must(t, again.Release(ctx, vm, "taken"))
	if again.Attached() != 1 {
		t.Errorf("%d disks are left, want the new one", again.Attached())
	}
}

// What is no file of the host has a name that is no path.
func TestPiecesInMemoryHaveNoPath(t *testing.T) {
	p, err := memoryPart("head", make([]byte, hypervisor.SectorBytes))
	must(t, err)
	defer p.File.Close()
	if filepath.IsAbs(p.File.Name()) {
		t.Errorf("its name is %s", p.File.Name())
	}
	if _, err := p.File.WriteAt([]byte("x"), 0); err == nil {
		t.Error("it can be written")
	}
}

// TestRestoredCopies: a guest that has copies of volumes gets what is on the host
// now, in the place that it has; of an empty file that containers write to, the
// host gets the guest's content.
func TestRestoredCopies(t *testing.T) {
	dir := t.TempDir()
	settings, words, hosts := dir+"/settings", dir+"/words", dir+"/hosts"
	kubelet(t, settings, "1", map[string]string{"key": "old", "gone": "soon"})
	must(t, os.WriteFile(words, nil, 0o644))
	must(t, os.WriteFile(hosts, []byte("old"), 0o644))
	s, g := newShare(t), newCopies()
	places := map[string]string{}
	for source, writable := range map[string]bool{settings: false, words: true, hosts: true} {
		var err error
		places[source], err = s.Sync("c", source, writable, nil)
		must(t, err)
	}
	push(t, s, "c", g)
	g.write(places[words], "last words")
	becomes(t, words, "last words")
	saved, number := s.Copies("c"), s.SyncedNumber()
	if len(saved) != 3 || number != 3 {
		t.Fatalf("saved: %v, %d", saved, number)
	}

	restored, guest := newShare(t), newCopies()
	guest.files, _ = g.all()
	restored.ContinueSynced(number)
	must(t, os.RemoveAll(settings))
	kubelet(t, settings, "2", map[string]string{"key": "new"})
	must(t, os.WriteFile(words, nil, 0o644))
	must(t, os.WriteFile(hosts, []byte("new"), 0o644))
	for source, writable := range map[string]bool{settings: false, words: true, hosts: true} {
		was := saved[places[source]]
		place, err := restored.Sync("other", source, writable, &was)
		if must(t, err); place != places[source] {
			t.Errorf("%s is at %s, the guest has it at %s", source, place, places[source])
		}
	}
	push(t, restored, "other", guest)
	becomes(t, words, "last words")
	files, _ := guest.all()
	if guest.data(places[settings]+"/..2/key") != "new" || guest.data(places[settings]+"/..data") != "..2" || guest.data(places[hosts]) != "new" {
		t.Errorf("the guest has %v", files)
	}
	for _, gone := range []string{"/gone", "/..1/key"} {
		if got := guest.data(places[settings] + gone); got != "(none)" {
			t.Errorf("%s is %q, which the host has no more", gone, got)
		}
	}
	fresh, err := restored.Sync("other", write(t, dir+"/fresh", "x"), true, nil)
	if must(t, err); filepath.Base(filepath.Dir(fresh)) != "4" {
		t.Errorf("a new volume is at %s", fresh)
	}
	was := saved[places[settings]]
	if _, err := restored.Sync("third", hosts, false, &was); err == nil || !strings.Contains(err.Error(), "must be one again") {
		t.Errorf("a file in the place of a directory: %v", err)
	}
	restored.Unsync("third")
	volumes := restored.synced.users["other"]
	restored.Unsync("other")
	for _, v := range volumes {
		if v.restored != nil { // the other one was never pushed
			<-v.ended
		}
	}
	if got := guest.data(places[hosts]); got != "new" {
		t.Errorf("what a container that is still frozen may have mounted is %q", got)
	}
}
