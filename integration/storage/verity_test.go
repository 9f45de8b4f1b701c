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

	content, err := os.ReadFile(layer)
	b.must(err)
	at := bytes.Index(content, []byte(secret[:100])) + 20000
	content[at] ^= 1
	b.must(os.WriteFile(layer, content, 0o644))
	r := b.ctr(b.runArgs(img.Name, "corrupt", []string{"--rm"}, "sh", "-c", "echo begun; cat /data >/dev/null")...)
	if r.Code == 0 || r.Stdout != "begun\n" || !strings.Contains(r.Stderr, "Input/output error") {
		t.Errorf("reading corrupted data: %+v; want an I/O error", r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := b.c.WaitLog(ctx, func(line string) bool {
		return strings.Contains(line, "cid=corrupt") && strings.Contains(line, "does not match its dm-verity root hash")
	}); err != nil {
		t.Errorf("the log does not say why: %v", err)
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
