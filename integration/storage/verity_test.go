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
// byte that has changed since fails the read, and the log says why.
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
	b.start(img.Name, "verity")
	want(t, "data", b.shell("verity", "wc -c </data; own; ls -d /sys/block/dm-*"), fmt.Sprintf("%d\nown\n/sys/block/dm-0", len(secret)))
	b.remove("verity")

	b.corrupt(layer, secret[:100])
	b.refusesToRead(img.Name, "corrupt", "begun", "echo begun; cat /data >/dev/null")
	b.logsCorruption("corrupt", "layer 0 (/dev/vda1)")
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
	b.corrupt(layers[0], bad[:100])
	b.refusesToRead(img.Name, "merged-corrupt", fmt.Sprintf("3 %d", len(good)), "echo $(ls -d /sys/block/dm-* | wc -l) $(cat /good | wc -c); cat /bad >/dev/null")
	b.logsCorruption("merged-corrupt", "layer 0, device 2 (/dev/vda")
}

// corrupt changes a byte of a layer in the file that begins with text.
func (b *box) corrupt(layer, text string) {
	b.Helper()
	content, err := os.ReadFile(layer)
	b.must(err)
	content[bytes.Index(content, []byte(text))+20000] ^= 1
	b.must(os.WriteFile(layer, content, 0o644))
}

// refusesToRead runs a script that prints a line and then fails to read.
func (b *box) refusesToRead(image, id, line, script string) {
	b.Helper()
	r := b.ctr(b.runArgs(image, id, []string{"--rm"}, "sh", "-c", script)...)
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
