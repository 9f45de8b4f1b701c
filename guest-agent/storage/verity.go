// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols"
)

// The superblock before a dm-verity hash tree (cryptsetup, DMVerity wiki: on-disk
// format): 512 bytes, little endian.
const (
	veritySuperBytes  = 512
	verityMagic       = "verity\x00\x00"
	verityTypeAt      = 12
	verityAlgorithmAt = 32
	verityDataSizeAt  = 64
	verityHashSizeAt  = 68
	verityBlocksAt    = 72
	veritySaltSizeAt  = 80
	veritySaltAt      = 88
	maxVeritySalt     = 256
)

// verityAlgorithms are those that a hash tree may have, with the length of a
// digest: the superblock comes from the disk, only the root hash does not.
var verityAlgorithms = map[string]int{"sha256": 32, "sha512": 64}

// verity is what the host says of a layer's hash tree.
type verity struct {
	root   string // hexadecimal
	offset uint64 // of its superblock, in bytes
}

// verityOf reads the options of a Storage, nil when it has no hash tree.
func verityOf(options []string) (*verity, error) {
	v := &verity{}
	for _, o := range options {
		if root, ok := strings.CutPrefix(o, protocols.OptVerityRoot); ok {
			v.root = root
		}
		if at, ok := strings.CutPrefix(o, protocols.OptVerityOffset); ok {
			var err error
			if v.offset, err = strconv.ParseUint(at, 10, 62); err != nil {
				return nil, fault.New(fault.InvalidArgument, "layer option %q: want a number of bytes", o)
			}
		}
	}
	if v.root == "" && !slices.Contains(options, protocols.OptVerity) {
		return nil, nil
	}
	if _, err := hex.DecodeString(v.root); err != nil || v.root == "" || v.offset == 0 {
		return nil, fault.New(fault.InvalidArgument, "layer with dm-verity: root hash %q at byte %d: want both", v.root, v.offset)
	}
	return v, nil
}

// verityDevice is an open dm-verity device.
type verityDevice struct {
	name, node string
	what       string // what it verifies, for errors
}

// openVerity puts dm-verity on a device that has data and hash tree.
func (m *Manager) openVerity(v *verity, node, name string) (*verityDevice, error) {
	if err := m.modules.EnsureModule("dm_verity"); err != nil {
		return nil, err
	}
	f, err := os.Open(node)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	super := make([]byte, veritySuperBytes)
	if _, err := f.ReadAt(super, int64(v.offset)); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	t, err := verityTarget(v, node, super)
	if err != nil {
		return nil, err
	}
	minor, err := dmCreate(name, t)
	if err != nil {
		return nil, err
	}
	return &verityDevice{name: name, node: filepath.Join(m.finder.Dev, "dm-"+strconv.Itoa(int(minor)))}, nil
}

// verityTarget is the device's table (kernel Documentation/admin-guide/device-mapper/verity.rst).
func verityTarget(v *verity, node string, super []byte) (t dmTarget, err error) {
	bad := func(format string, args ...any) (dmTarget, error) {
		return t, fault.New(fault.InvalidArgument, "superblock: "+format, args...)
	}
	le := binary.LittleEndian
	if string(super[:8]) != verityMagic || le.Uint32(super[8:]) != 1 {
		return bad("no dm-verity of version 1 at byte %d", v.offset)
	}
	name, _, _ := bytes.Cut(super[verityAlgorithmAt:verityDataSizeAt], []byte{0})
	if n, ok := verityAlgorithms[string(name)]; !ok || len(v.root) != 2*n {
		return bad("algorithm %q for a root hash of %d digits: want sha256 or sha512", name, len(v.root))
	}
	data, hash := uint64(le.Uint32(super[verityDataSizeAt:])), uint64(le.Uint32(super[verityHashSizeAt:]))
	for _, n := range []uint64{data, hash} {
		if n < 512 || n > 65536 || n&(n-1) != 0 {
			return bad("block size %d: want a power of two from 512 to 65536", n)
		}
	}
	blocks := le.Uint64(super[verityBlocksAt:])
	if blocks == 0 || blocks > v.offset/data {
		return bad("%d blocks of data before byte %d", blocks, v.offset)
	}
	salt := "-"
	if n := le.Uint16(super[veritySaltSizeAt:]); n > maxVeritySalt {
		return bad("a salt of %d bytes", n)
	} else if n > 0 {
		salt = hex.EncodeToString(super[veritySaltAt : veritySaltAt+int(n)])
	}
	start := (v.offset + veritySuperBytes + hash - 1) / hash // the tree begins with the next block
	return dmTarget{
		sectors: blocks * data / 512, kind: "verity",
		params: fmt.Sprintf("%d %s %s %d %d %d %d %s %s %s", le.Uint32(super[verityTypeAt:]), node, node, data, hash, blocks, start, name, v.root, salt),
	}, nil
}

// corrupted tells whether a read has failed its check.
func (d *verityDevice) corrupted() bool {
	status, err := dmStatus(d.name)
	return err == nil && strings.HasPrefix(status, "C")
}

func (d *verityDevice) close() error { return dmRemove(d.name) }
