// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"strings"
	"testing"
)

// bzImage wraps a payload the way the kernel's build does.
func bzImage(payload []byte) []byte {
	const setupSects, offset = 3, 100
	b := make([]byte, (setupSects+1)*sector+offset)
	b[offSetupSects] = setupSects
	copy(b[offMagic:], "HdrS")
	binary.LittleEndian.PutUint16(b[offVersion:], 0x020f)
	binary.LittleEndian.PutUint32(b[offPayloadOffset:], offset)
	binary.LittleEndian.PutUint32(b[offPayloadLength:], uint32(len(payload)))
	return append(append(b, payload...), "what follows the payload"...)
}

func TestExtractEveryCompression(t *testing.T) {
	vmlinux := append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel text "), 5000)...)
	size := binary.LittleEndian.AppendUint32(nil, uint32(len(vmlinux)))
	for _, c := range []struct {
		tool   string
		args   []string
		append []byte
	}{
		{"lz4", []string{"-lc"}, size}, {"zstd", []string{"-c"}, size},
		{"xz", []string{"-c", "--check=crc32"}, nil}, {"gzip", []string{"-c"}, nil}, {"cat", nil, nil},
	} {
		cmd := exec.Command(c.tool, c.args...)
		cmd.Stdin = bytes.NewReader(vmlinux)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", c.tool, err)
		}
		got, err := Extract(bzImage(append(packed, c.append...)))
		if err != nil || !bytes.Equal(got, vmlinux) {
			t.Errorf("%s: %d bytes, %v; want %d bytes", c.tool, len(got), err, len(vmlinux))
		}
	}
	if got, err := Extract(vmlinux); err != nil || !bytes.Equal(got, vmlinux) {
		t.Errorf("an ELF file: %d bytes, %v; want it as it is", len(got), err)
	}
}

func TestExtractRefuses(t *testing.T) {
	truncated := bzImage([]byte("\x7fELF 12345678"))
	old := bzImage([]byte("\x7fELF 12345678"))
	binary.LittleEndian.PutUint16(old[offVersion:], 0x0207)
	for want, b := range map[string][]byte{
		"no x86 boot header":     []byte("short"),
		"does not lie inside":    truncated[:len(truncated)-40],
		"boot protocol 2.07":     old,
		"payload starts with 77": bzImage([]byte("what is this")),
		"unpack the lz4":         bzImage([]byte("\x02\x21\x4c\x18 broken stream")),
		"hold an ELF file":       bzImage(gzipped(t, "no kernel")),
	} {
		if _, err := Extract(b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v; want an error with %q", err, want)
		}
	}
}

func gzipped(t *testing.T, s string) []byte {
	t.Helper()
	cmd := exec.Command("gzip", "-c")
	cmd.Stdin = strings.NewReader(s)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}
