// SPDX-License-Identifier: Apache-2.0

// Package kernel takes the uncompressed kernel out of a distribution's bzImage.
// The ELF file inside starts through PVH, which needs neither firmware work nor
// decompression in the guest. kata.config beside it configures the kernel that
// `make kernel` builds, which is such an ELF file from the start.
package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
)

// Offsets in the first sector of a bzImage: the kernel's
// Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
const (
	offSetupSects    = 0x1f1
	offMagic         = 0x202
	offVersion       = 0x206
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250
	// payload_offset exists since boot protocol 2.08.
	minVersion = 0x0208
	sector     = 512
)

const elfMagic = "\x7fELF"

// compressions tells payloads apart. All but gzip, xz and plain ELF carry four
// more bytes after the stream: its unpacked size.
var compressions = []struct {
	name, magic string
	tool        []string
	sizeAppends bool
}{
	{"lz4", "\x02\x21\x4c\x18", []string{"lz4", "-dc"}, true},
	{"zstd", "\x28\xb5\x2f\xfd", []string{"zstd", "-dc"}, true},
	{"xz", "\xfd7zXZ\x00", []string{"xz", "-dc", "--single-stream"}, false},
	{"gzip", "\x1f\x8b", []string{"gzip", "-dc"}, false},
}

// Extract returns the vmlinux ELF inside a bzImage, or the file itself when it is
// an ELF file already. Which of the lz4, zstd, xz and gzip programs is called
// depends on how the kernel was packed.
func Extract(bzImage []byte) ([]byte, error) {
	if bytes.HasPrefix(bzImage, []byte(elfMagic)) {
		return bzImage, nil
	}
	payload, err := payload(bzImage)
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	if bytes.HasPrefix(payload, []byte(elfMagic)) {
		return payload, nil
	}
	for _, c := range compressions {
		if !bytes.HasPrefix(payload, []byte(c.magic)) {
			continue
		}
		if c.sizeAppends {
			payload = payload[:len(payload)-4]
		}
		vmlinux, err := unpack(c.tool, payload)
		if err != nil {
			return nil, fmt.Errorf("kernel: unpack the %s payload: %w", c.name, err)
		}
		if !bytes.HasPrefix(vmlinux, []byte(elfMagic)) {
			return nil, fmt.Errorf("kernel: the %s payload does not hold an ELF file", c.name)
		}
		return vmlinux, nil
	}
	return nil, fmt.Errorf("kernel: payload starts with % x: want lz4, zstd, xz, gzip or ELF", payload[:min(6, len(payload))])
}

// payload is the compressed kernel inside the bzImage.
func payload(b []byte) ([]byte, error) {
	if len(b) < headerEnd || string(b[offMagic:offMagic+4]) != "HdrS" {
		return nil, errors.New("no x86 boot header: want a bzImage (vmlinuz-*)")
	}
	if v := binary.LittleEndian.Uint16(b[offVersion:]); v < minVersion {
		return nil, fmt.Errorf("boot protocol %d.%02d: want 2.08 or newer", v>>8, v&0xff)
	}
	setup := uint64(b[offSetupSects])
	if setup == 0 {
		setup = 4 // boot.rst: for backwards compatibility 0 means 4
	}
	start := (setup+1)*sector + uint64(binary.LittleEndian.Uint32(b[offPayloadOffset:]))
	length := uint64(binary.LittleEndian.Uint32(b[offPayloadLength:]))
	if length < 8 || start+length > uint64(len(b)) {
		return nil, fmt.Errorf("payload of %d bytes at %d does not lie inside the file of %d bytes", length, start, len(b))
	}
	return b[start : start+length], nil
}

func unpack(tool []string, data []byte) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(tool[0], tool[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", tool[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
