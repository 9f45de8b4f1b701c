// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestVerity: layers with a hash tree beside them are read through dm-verity; a
// byte that has changed since fails the read, and the log says why, or keeps the
// container from being made, and the error does. Who is in the pod already goes on.
func TestVerity(t *testing.T) {
	secret := strings.Repeat("what is read must be what was written; ", 1000)
	img := onBusybox(t, lab.Image{Name: "example.com/verity:latest", Layers: [][]lab.File{{
		{Path: "data", Mode: 0o644, Data: []byte(secret)}, {Path: "bin/own", Mode: 0o755, Data: []byte("#!/bin/sh\necho own\n")},
	}}})
	b := openBox(t, "plain", plain())
	before, err := b.c.LayerFiles()
	b.must(err)
	b.importImage(img)
	layer := newLayer(t, b, before, secret[:4000])
	addVerity(t, layer)
	member := []string{"--annotation", "io.containerd.runc.v2.group=verity"}
	b.start(img.Name, "verity", member...)
	want(t, "data", b.shell("verity", "wc -c </data; own; ls -d /sys/block/dm-*"), fmt.Sprintf("%d\nown\n/sys/block/dm-0", len(secret)))
	b.corrupt(layer, bytes.Index(readLayer(t, layer), []byte(secret[:100]))+20000)
	b.refusesToRead(img.Name, "corrupt", "begun", "echo begun; cat /data >/dev/null", member...)
	b.logsCorruption("corrupt", "layer 0 (/dev/vda1)")
	b.corrupt(layer, 1024+48) // the superblock's UUID
	r := b.ctr(b.runArgs(img.Name, "none", append([]string{"--rm"}, member...), "true")...)
	if r.Code == 0 || !strings.Contains(r.Stderr, "layer 0 (/dev/vda1) is corrupted") {
		t.Errorf("a layer that cannot be mounted: %+v; want an error that says why", r)
	}
	want(t, "the neighbour says", b.shell("verity", "echo alive"), "alive")
	b.remove("none")
	b.remove("verity")
}

func readLayer(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// TestMergedVerity: below merged metadata each file is read through dm-verity that has
// a hash tree beside it, the metadata too.
func TestMergedVerity(t *testing.T) {
	good, bad := strings.Repeat("what is as it was in the lower layer; ", 1000), strings.Repeat("what is not what it was in the upper one; ", 1000)
	img := onBusybox(t, lab.Image{Name: "example.com/merged-verity:latest", Layers: [][]lab.File{
		{{Path: "good", Mode: 0o644, Data: []byte(good)}}, {{Path: "bad", Mode: 0o644, Data: []byte(bad)}},
	}})
	b := openBox(t, "plain", plain(), img)
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	layers := b.layersOf(img)
	b.must(b.c.MergeLayers(ctx, layers))
	metadata := filepath.Join(filepath.Dir(layers[0]), "fsmeta.erofs")
	for _, file := range []string{layers[0], layers[1], metadata} { // not busybox's
		addVerity(t, file)
	}
	b.corrupt(layers[0], bytes.Index(readLayer(t, layers[0]), []byte(bad[:100]))+20000)
	b.refusesToRead(img.Name, "merged-corrupt", fmt.Sprintf("3 %d", len(good)), "echo $(ls -d /sys/block/dm-* | wc -l) $(cat /good | wc -c); cat /bad >/dev/null")
	b.logsCorruption("merged-corrupt", "layer 0, device 2 (/dev/vda")
}

// corrupt changes a byte of a layer.
func (b *box) corrupt(layer string, at int) {
	b.Helper()
	content := readLayer(b.T, layer)
	content[at] ^= 1
	b.must(os.WriteFile(layer, content, 0o644))
}

// refusesToRead runs a script that prints a line and then fails to read.
func (b *box) refusesToRead(image, id, line, script string, flags ...string) {
	b.Helper()
	r := b.ctr(b.runArgs(image, id, append([]string{"--rm"}, flags...), "sh", "-c", script)...)
	if r.Code == 0 || r.Stdout != line+"\n" || !strings.Contains(r.Stderr, "Input/output error") {
		b.Errorf("reading corrupted data: %+v; want %q and an I/O error", r, line)
	}
}

// logsCorruption waits for the guest's line about a container's corrupted layer.
func (b *box) logsCorruption(id, layer string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := b.c.WaitLog(ctx, func(line string) bool {
		return strings.Contains(line, "cid="+id) && strings.Contains(line, layer) && strings.Contains(line, "does not match its dm-verity root hash")
	}); err != nil {
		b.Errorf("the log does not say why: %v", err)
	}
}

// addVerity appends a hash tree to a layer and writes its metadata beside it, as
// containerd's differ does with enable_dmverity, for which this host's kernel would
// need device-mapper. Format: cryptsetup, DMVerity wiki, on-disk format.
func addVerity(t *testing.T, layer string) {
	t.Helper()
	const block = 4096
	data, err := os.ReadFile(layer)
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, make([]byte, (block-len(data)%block)%block)...)
	salt := make([]byte, 32)
	level := func(in []byte) []byte {
		var out []byte
		for at := 0; at < len(in); at += block {
			sum := sha256.Sum256(append(bytes.Clone(salt), in[at:at+block]...))
			out = append(out, sum[:]...)
		}
		return append(out, make([]byte, (block-len(out)%block)%block)...)
	}
	// The tree is stored from the level of one block down to that of the data.
	top := level(data)
	tree := top
	for len(top) > block {
		top = level(top)
		tree = append(bytes.Clone(top), tree...)
	}
	root := sha256.Sum256(append(bytes.Clone(salt), top...))
	super := make([]byte, block)
	copy(super, "verity\x00\x00")
	le := binary.LittleEndian
	le.PutUint32(super[8:], 1)
	le.PutUint32(super[12:], 1)
	copy(super[32:], "sha256")
	le.PutUint32(super[64:], block)
	le.PutUint32(super[68:], block)
	le.PutUint64(super[72:], uint64(len(data)/block))
	le.PutUint16(super[80:], uint16(len(salt)))
	copy(super[88:], salt)
	metadata := fmt.Sprintf(`{"roothash":%q,"hashoffset":%d}`, hex.EncodeToString(root[:]), len(data))
	for path, content := range map[string][]byte{layer: append(append(data, super...), tree...), layer + ".dmverity": []byte(metadata)} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
