// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// lay is a layer of the group with the root /root.
func lay(fstype string, options ...string) *agentpb.Storage {
	return &agentpb.Storage{Driver: "blk", Source: "08/00", Fstype: fstype, MountPoint: "/root", Options: append(options, protocols.OptMultiLayer)}
}

func TestSortLayers(t *testing.T) {
	g, err := sortLayers([]*agentpb.Storage{
		lay("ext4", "rw", "noatime", protocols.OptOverlayUpper),
		lay("erofs", "ro", protocols.OptOverlayLower, protocols.OptPartitioned, protocols.OptPartition+"2", protocols.OptOverlay+"index=off",
			protocols.OptDevicePartition+"5", protocols.OptDevicePartition+"4:bb:8192"),
		lay("erofs", "ro", protocols.OptVerity, protocols.OptVerityRoot+"aa", protocols.OptVerityOffset+"4096"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if g.mp != "/root" || g.upper == nil || strings.Join(g.upper.options, ",") != "rw,noatime" || len(g.lowers) != 2 || strings.Join(g.overlay, ",") != "index=off" {
		t.Errorf("%+v", g)
	}
	if l := g.lowers[0]; l.partition != 2 || strings.Join(l.options, ",") != "ro" || l.verity != nil || !reflect.DeepEqual(l.devices, []device{{5, nil}, {4, &verity{"bb", 8192}}}) {
		t.Errorf("first lower: %+v", l)
	}
	if v := g.lowers[1].verity; v == nil || v.root != "aa" || v.offset != 4096 || g.lowers[1].partition != 0 {
		t.Errorf("second lower: %+v", g.lowers[1])
	}
	other := lay("erofs")
	other.MountPoint = "/else"
	scsi := lay("erofs")
	scsi.Driver = "scsi"
	for name, group := range map[string][]*agentpb.Storage{
		"two roots": {lay("erofs"), other}, "a driver": {scsi}, "two uppers": {lay("ext4"), lay("ext4"), lay("erofs")},
		"no lower": {lay("ext4")}, "partition": {lay("erofs", protocols.OptPartition+"0")}, "a device's partition": {lay("erofs", protocols.OptDevicePartition+"x")},
		"a device's hash": {lay("erofs", protocols.OptDevicePartition+"4:xx:4096")}, "a device's tree": {lay("erofs", protocols.OptDevicePartition+"4:aa")},
		"verity without a hash": {lay("erofs", protocols.OptVerity)},
		"verity at no number":   {lay("erofs", protocols.OptVerityRoot+"aa", protocols.OptVerityOffset+"x")},
		"a directory outside":   {lay("ext4", protocols.OptRootDir+"../x")}, "a directory and lowers": {lay("ext4", protocols.OptRootDir+"x"), lay("erofs")},
	} {
		if _, err := sortLayers(group); fault.KindOf(err) != fault.InvalidArgument || err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if IsLayer(&agentpb.Storage{Options: []string{"ro"}}) {
		t.Error("a Storage without the mark is a layer")
	}
}

// veritySuper is a valid superblock of three data blocks.
func veritySuper() []byte {
	b := make([]byte, veritySuperBytes)
	le := binary.LittleEndian
	copy(b, verityMagic)
	le.PutUint32(b[8:], 1)
	le.PutUint32(b[verityTypeAt:], 1)
	copy(b[verityAlgorithmAt:], "sha256")
	le.PutUint32(b[verityDataSizeAt:], 4096)
	le.PutUint32(b[verityHashSizeAt:], 4096)
	le.PutUint64(b[verityBlocksAt:], 3)
	le.PutUint16(b[veritySaltSizeAt:], 2)
	b[veritySaltAt], b[veritySaltAt+1] = 0xab, 0xcd
	return b
}

func TestVerityTarget(t *testing.T) {
	v := &verity{root: strings.Repeat("0f", 32), offset: 3 * 4096}
	got, err := verityTarget(v, "/dev/vda1", veritySuper())
	want := dmTarget{sectors: 24, kind: "verity", params: "1 /dev/vda1 /dev/vda1 4096 4096 3 4 sha256 " + v.root + " abcd"}
	if err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for name, change := range map[string]func(b []byte){
		"magic": func(b []byte) { b[0] = 'x' }, "version": func(b []byte) { b[8] = 2 },
		"algorithm": func(b []byte) { copy(b[verityAlgorithmAt:], "md5\x00") }, "digest's length": func(b []byte) { copy(b[verityAlgorithmAt:], "sha512") },
		"data block": func(b []byte) { b[verityDataSizeAt+1] = 0 }, "hash block": func(b []byte) { b[verityHashSizeAt] = 1 },
		"no blocks": func(b []byte) { b[verityBlocksAt] = 0 }, "blocks over the tree": func(b []byte) { b[verityBlocksAt] = 4 },
		"blocks that overflow": func(b []byte) { b[verityBlocksAt+7] = 0xff }, "salt": func(b []byte) { b[veritySaltSizeAt+1] = 2 },
	} {
		b := veritySuper()
		change(b)
		if _, err := verityTarget(v, "/dev/vda1", b); err == nil || !strings.Contains(err.Error(), "superblock") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSmallBlocks: only blocks below a page are a reason.
func TestSmallBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layer")
	for bits, want := range map[byte]bool{0: false, 9: true, 12: false, 200: false} {
		super := make([]byte, 2048)
		super[1024+12] = bits
		if err := os.WriteFile(path, super, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := smallBlocks(path, "erofs"); (err != nil) != want {
			t.Errorf("2^%d: %v", bits, err)
		}
	}
	if err := errors.Join(smallBlocks(path+"x", "erofs"), smallBlocks(path, "ext4")); err != nil {
		t.Error(err)
	}
}

// TestRemoveDirs: mount points go, what is in one of them stays.
func TestRemoveDirs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "g")
	for _, d := range []string{"0", "1", "u"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kept := filepath.Join(dir, "1", "kept")
	if err := os.WriteFile(kept, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := removeDirs(dir); err == nil {
		t.Error("a directory with a file in it was removed")
	}
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	if err := removeDirs(dir); err != nil {
		t.Error(err)
	}
	if err := removeDirs(dir); err != nil {
		t.Errorf("again: %v", err)
	}
}
