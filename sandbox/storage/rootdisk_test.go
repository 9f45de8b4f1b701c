// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// erofsImage is an image of that many blocks of 4096 bytes whose block N is full
// of fill, but for the superblock; devices are entries of its device table.
func erofsImage(blocks int, fill byte, devices ...erofsDevice) []byte {
	b := bytes.Repeat([]byte{fill}, blocks*4096)
	s := b[erofsSuperOffset:]
	clear(s[:erofsSuperBytes])
	le := binary.LittleEndian
	le.PutUint32(s, erofsMagic)
	s[erofsBlockBitsAt] = 12
	le.PutUint32(s[erofsBlocksAt:], uint32(blocks))
	if len(devices) > 0 {
		le.PutUint32(s[erofsIncompatAt:], erofsIncompatTable)
		le.PutUint16(s[erofsDevicesAt:], uint16(len(devices)))
		le.PutUint16(s[erofsDeviceTableAt:], 9)
	}
	for i, d := range devices {
		slot := b[(9+i)*erofsSlotBytes:]
		le.PutUint32(slot[erofsSlotBlocksAt:], uint32(d.size/4096))
		le.PutUint32(slot[erofsSlotMappedAt:], uint32(d.at/4096))
	}
	return b
}

func writeBytes(t *testing.T, path string, data []byte) string {
	t.Helper()
	must(t, os.WriteFile(path, data, 0o600))
	return path
}

// join reads a disk of several parts as the machine shows it.
func join(t *testing.T, parts []hypervisor.DiskPart) []byte {
	t.Helper()
	var out bytes.Buffer
	for _, p := range parts {
		n := int64(p.Sectors * hypervisor.SectorBytes)
		data, err := io.ReadAll(io.NewSectionReader(p.File, 0, n))
		must(t, err)
		out.Write(data)
		out.Write(make([]byte, n-int64(len(data))))
	}
	return out.Bytes()
}

// TestLayersOnOneDisk: each layer is a partition, and starts where the table says.
func TestLayersOnOneDisk(t *testing.T) {
	dir := t.TempDir()
	r := &Root{}
	const layers = 130 // more than the usual table has entries
	for i := range layers {
		path := writeBytes(t, filepath.Join(dir, fmt.Sprint(i)), append(erofsImage(1+i%3, byte(i+1)), make([]byte, i%2*100)...))
		r.Lowers = append(r.Lowers, Layer{Type: "erofs", Source: path, Options: []string{"ro"}})
	}
	d, err := r.Open(NewDisks())
	must(t, err)
	defer d.Close()
	disk := join(t, d.Layers.Parts)
	parts := readGPT(t, disk)
	if len(parts) != layers {
		t.Fatalf("%d partitions, want %d", len(parts), layers)
	}
	for i, p := range parts {
		at := p.first * hypervisor.SectorBytes
		if at%layerAlign != 0 || binary.LittleEndian.Uint32(disk[at+erofsSuperOffset:]) != erofsMagic || disk[at] != byte(i+1) {
			t.Errorf("partition %d at %d does not begin with its layer", i, at)
		}
		if want := uint64(1+i%3+i%2) * 8; p.count != want {
			t.Errorf("partition %d has %d sectors, want %d", i, p.count, want)
		}
	}
	if !d.Layers.ReadOnly || strings.Count(d.Layers.Key, "/") != layers {
		t.Errorf("read-only %v, key %q", d.Layers.ReadOnly, d.Layers.Key)
	}
	again, err := r.Open(NewDisks())
	must(t, err)
	defer again.Close()
	if again.Layers.Key != d.Layers.Key || !bytes.Equal(join(t, again.Layers.Parts), disk) {
		t.Error("the same layers give another disk")
	}
}

// readGPT checks both copies of a table and returns the partitions in use.
func readGPT(t *testing.T, disk []byte) (out []partition) {
	t.Helper()
	le := binary.LittleEndian
	last := uint64(len(disk))/hypervisor.SectorBytes - 1
	for _, lba := range []uint64{1, last} {
		h := bytes.Clone(disk[lba*hypervisor.SectorBytes:][:gptHeaderBytes])
		sum := le.Uint32(h[16:])
		le.PutUint32(h[16:], 0)
		if string(h[:8]) != "EFI PART" || crc32.ChecksumIEEE(h) != sum || le.Uint64(h[24:]) != lba || le.Uint64(h[32:]) != last+1-lba {
			t.Fatalf("header at sector %d of %d: % x", lba, last, h)
		}
		n := le.Uint32(h[80:])
		table := disk[le.Uint64(h[72:])*hypervisor.SectorBytes:][:n*gptEntryBytes]
		if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
			t.Fatalf("table of the header at sector %d: wrong checksum", lba)
		}
		out = nil
		next := le.Uint64(h[40:])
		for e := range n {
			entry := table[e*gptEntryBytes:]
			first, end := le.Uint64(entry[32:]), le.Uint64(entry[40:])
			if first == 0 {
				continue
			}
			window := end < next // a piece of one before
			if first != next && !window || end < first || first < le.Uint64(h[40:]) {
				t.Fatalf("partition %d from %d to %d: want it to begin at %d", e, first, end, next)
			}
			if !window {
				next = end + 1
			}
			out = append(out, partition{first, end + 1 - first})
		}
		if next-1 != le.Uint64(h[48:]) {
			t.Fatalf("the last partition ends at %d, the header says %d", next-1, le.Uint64(h[48:]))
		}
	}
	return out
}

// TestMergedLayers: metadata and data lie where the device table says, and each
// device has a partition of its own behind those of the layers.
func TestMergedLayers(t *testing.T) {
	dir := t.TempDir()
	one, two := writeBytes(t, filepath.Join(dir, "1"), erofsImage(3, 1)), writeBytes(t, filepath.Join(dir, "2"), erofsImage(2, 2))
	meta := writeBytes(t, filepath.Join(dir, "meta"), erofsImage(1, 9, erofsDevice{4 * 4096, 3 * 4096}, erofsDevice{7 * 4096, 2 * 4096}))
	r := &Root{Lowers: []Layer{{Type: "erofs", Source: meta, Devices: []string{one, two}}, {Type: "erofs", Source: one}}, ReadOnly: true}
	d, err := r.Open(NewDisks())
	must(t, err)
	defer d.Close()
	disk := join(t, d.Layers.Parts)
	parts := readGPT(t, disk)
	if len(parts) != 4 {
		t.Fatalf("%d partitions, want 4", len(parts))
	}
	layer := disk[parts[0].first*hypervisor.SectorBytes:]
	if parts[0].count != 9*8 || layer[0] != 9 || layer[4*4096-1] != 0 || layer[4*4096] != 1 || layer[7*4096] != 2 {
		t.Errorf("%d sectors: %d %d %d", parts[0].count, layer[0], layer[4*4096], layer[7*4096])
	}
	if first := parts[0].first; parts[2] != (partition{first + 4*8, 3 * 8}) || parts[3] != (partition{first + 7*8, 2 * 8}) {
		t.Errorf("partitions of the devices: %v", parts[2:])
	}
	s := d.Storages("c1", "08/00", "")
	for i, want := range []string{"X-kata.partition-number=1 io.katacontainers.fs-opt.device-partition=3 io.katacontainers.fs-opt.device-partition=4", "X-kata.partition-number=2"} {
		if got := strings.Join(s[i].Options, " "); !strings.HasSuffix(got, want) {
			t.Errorf("storage %d: %s; want %s", i, got, want)
		}
	}
}

// TestMergedVerity: with a hash tree behind one of its files all of them are there to
// their ends, the partition of the layer has the metadata alone, and the guest gets
// each tree.
func TestMergedVerity(t *testing.T) {
	dir := t.TempDir()
	tree := func(n int) []byte { return bytes.Repeat([]byte{0xee}, n*4096) }
	one := writeBytes(t, filepath.Join(dir, "1"), append(erofsImage(3, 1), tree(2)...))
	two := writeBytes(t, filepath.Join(dir, "2"), erofsImage(2, 2))
	meta := writeBytes(t, filepath.Join(dir, "meta"), append(erofsImage(1, 9, erofsDevice{4096, 3 * 4096}, erofsDevice{4 * 4096, 2 * 4096}), tree(1)...))
	r := &Root{Lowers: []Layer{{Type: "erofs", Source: two}, {Type: "erofs", Source: meta, Devices: []string{one, two}}}, ReadOnly: true}
	plain, err := r.Open(NewDisks())
	must(t, err)
	defer plain.Close()
	writeBytes(t, one+".dmverity", []byte(`{"roothash":"aa","hashoffset":12288}`))
	writeBytes(t, meta+".dmverity", []byte(`{"roothash":"bb","hashoffset":4096}`))
	writeBytes(t, two+".dmverity.old", nil)
	d, err := r.Open(NewDisks())
	must(t, err)
	defer d.Close()
	disk := join(t, d.Layers.Parts)
	parts := readGPT(t, disk)
	if len(parts) != 4 || parts[1].count != 2*8 || parts[2].count != 5*8 || parts[3].count != 2*8 {
		t.Fatalf("partitions: %v", parts)
	}
	for i, want := range [][]byte{erofsImage(2, 2), nil, append(erofsImage(3, 1), tree(2)...), erofsImage(2, 2)} {
		if at := parts[i].first * hypervisor.SectorBytes; want != nil && !bytes.Equal(disk[at:at+parts[i].count*hypervisor.SectorBytes], want) {
			t.Errorf("partition %d does not show its file", i+1)
		}
	}
	if plain.Layers.Key == d.Layers.Key {
		t.Errorf("both disks have the key %q", d.Layers.Key)
	}
	want := "X-kata.partition-number=2 io.katacontainers.fs-opt.device-partition=3:aa:12288 io.katacontainers.fs-opt.device-partition=4" +
		" X-kata.dmverity-enabled=true X-kata.dmverity.roothash=bb X-kata.dmverity.hashoffset=4096"
	if got := strings.Join(d.Storages("c1", "08/00", "")[1].Options, " "); !strings.HasSuffix(got, want) {
		t.Errorf("got %s; want %s", got, want)
	}
}

// TestTarIndex: data behind the index, in the same file, is part of the layer.
func TestTarIndex(t *testing.T) {
	data := append(erofsImage(1, 1, erofsDevice{4096, 2 * 4096}), bytes.Repeat([]byte("tar "), 2048)...)
	path := writeBytes(t, filepath.Join(t.TempDir(), "layer.erofs"), data)
	r := &Root{Lowers: []Layer{{Type: "erofs", Source: path}}, ReadOnly: true}
	d, err := r.Open(NewDisks())
	must(t, err)
	defer d.Close()
	if disk := join(t, d.Layers.Parts); !bytes.Equal(disk, data) || d.partitioned {
		t.Errorf("the disk has %d bytes, partitioned %v; want the file as it is", len(disk), d.partitioned)
	}
}

func TestStorages(t *testing.T) {
	two := &Root{Lowers: []Layer{{Type: "erofs", Options: []string{"ro"}}, {Type: "erofs", Options: []string{"ro"}}}, Options: []string{"index=off"}}
	written := *two
	written.Upper = &Layer{Type: "ext4", Options: []string{"rw"}}
	for name, c := range map[string]struct {
		d    RootDisks
		want []string
	}{
		"memory": {
			RootDisks{root: two, partitioned: true, verity: []verity{{"aa", 4096}, {}}},
			[]string{
				"blk 08/00 erofs ro X-kata.overlay-lower X-kata.multi-layer=true X-kata.gpt-partitioned=true X-kata.partition-number=1 X-kata.dmverity-enabled=true X-kata.dmverity.roothash=aa X-kata.dmverity.hashoffset=4096 io.katacontainers.fs-opt.overlay-rw io.katacontainers.fs-opt.overlay-option=index=off",
				"blk 08/00 erofs ro X-kata.overlay-lower X-kata.multi-layer=true X-kata.gpt-partitioned=true X-kata.partition-number=2",
			},
		},
		"ext4": {
			RootDisks{root: &written, partitioned: true, verity: make([]verity, 2), Upper: &Source{}},
			[]string{
				"blk 09/00 ext4 rw X-kata.overlay-upper X-kata.multi-layer=true",
				"blk 08/00 erofs ro X-kata.overlay-lower X-kata.multi-layer=true X-kata.gpt-partitioned=true X-kata.partition-number=1 io.katacontainers.fs-opt.overlay-option=index=off",
				"blk 08/00 erofs ro X-kata.overlay-lower X-kata.multi-layer=true X-kata.gpt-partitioned=true X-kata.partition-number=2",
			},
		},
		"whole": {RootDisks{root: &Root{Upper: &Layer{Type: "xfs", Options: []string{"nouuid"}}, ReadOnly: true}}, []string{"blk 09/00 xfs nouuid ro"}},
		"a directory": {
			RootDisks{root: &Root{Upper: &Layer{Type: "ext4"}, Dir: "upper"}},
			[]string{"blk 09/00 ext4 X-kata.overlay-upper X-kata.multi-layer=true io.katacontainers.fs-opt.root-dir=upper"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, s := range c.d.Storages("c1", "08/00", "09/00") {
				if s.MountPoint != "/run/kata-containers/c1/rootfs" {
					t.Errorf("mount point %s", s.MountPoint)
				}
				got = append(got, storageText(s))
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

func storageText(s *agentpb.Storage) string {
	return strings.TrimSpace(s.Driver + " " + s.Source + " " + s.Fstype + " " + strings.Join(s.Options, " "))
}

// TestBadLayers: what is wrong with a layer is named, with the layer.
func TestBadLayers(t *testing.T) {
	dir := t.TempDir()
	good := writeBytes(t, filepath.Join(dir, "good"), erofsImage(2, 1))
	truncated := writeBytes(t, filepath.Join(dir, "truncated"), erofsImage(2, 1)[:4096])
	text := writeBytes(t, filepath.Join(dir, "text"), bytes.Repeat([]byte("text"), 1000))
	short := writeBytes(t, filepath.Join(dir, "short"), []byte("x"))
	meta := writeBytes(t, filepath.Join(dir, "meta"), erofsImage(1, 9, erofsDevice{4096, 2 * 4096}))
	overlap := writeBytes(t, filepath.Join(dir, "overlap"), erofsImage(1, 9, erofsDevice{0, 4096}))
	verity := writeBytes(t, filepath.Join(dir, "verity"), []byte(`{"roothash":"zz","hashoffset":4096}`))
	beyond := writeBytes(t, filepath.Join(dir, "beyond"), []byte(`{"roothash":"aa","hashoffset":40960}`))
	hashed := writeBytes(t, filepath.Join(dir, "hashed"), erofsImage(2, 1))
	writeBytes(t, hashed+".dmverity", []byte(`{"roothash":"aa","hashoffset":40960}`))
	noJSON := writeBytes(t, filepath.Join(dir, "nojson"), []byte("aa"))
	pipe := filepath.Join(dir, "pipe")
	must(t, syscall.Mkfifo(pipe, 0o600))
	for name, c := range map[string]struct {
		layer Layer
		is    func(error) bool
		want  string
	}{
		"missing":                     {Layer{Source: dir + "/no"}, errdefs.IsNotFound, "/no"},
		"truncated":                   {Layer{Source: truncated}, errdefs.IsInvalidArgument, "4096 bytes, its superblock says 8192: it is truncated"},
		"no EROFS":                    {Layer{Source: text}, errdefs.IsInvalidArgument, "not an EROFS image"},
		"shorter than its superblock": {Layer{Source: short}, errdefs.IsInvalidArgument, "no EROFS superblock"},
		"a pipe":                      {Layer{Source: pipe}, errdefs.IsInvalidArgument, "want a regular file"},
		"a directory":                 {Layer{Source: dir}, errdefs.IsInvalidArgument, "want a regular file"},
		"a relative path":             {Layer{Source: "layer.erofs"}, errdefs.IsInvalidArgument, "absolute"},
		"devices not wanted":          {Layer{Source: good, Devices: []string{good}}, errdefs.IsInvalidArgument, "1 devices are given, the EROFS device table has 0"},
		"devices not given":           {Layer{Source: meta}, errdefs.IsInvalidArgument, "bytes 4096 to 12288 of a file of 4096, and no device= option names it"},
		"data within the index":       {Layer{Source: overlap}, errdefs.IsInvalidArgument, "bytes 0 to 4096"},
		"device truncated":            {Layer{Source: meta, Devices: []string{truncated}}, errdefs.IsInvalidArgument, "truncated"},
		"device missing":              {Layer{Source: meta, Devices: []string{dir + "/no"}}, errdefs.IsNotFound, "/no"},
		"device over another":         {Layer{Source: overlap, Devices: []string{good}}, errdefs.IsInvalidArgument, "device 0 lies at byte 0"},
		"no metadata":                 {Layer{Source: good, Verity: dir + "/no"}, errdefs.IsNotFound, "dm-verity metadata"},
		"metadata, no JSON":           {Layer{Source: good, Verity: noJSON}, errdefs.IsInvalidArgument, "nojson"},
		"root hash":                   {Layer{Source: good, Verity: verity}, errdefs.IsInvalidArgument, `roothash is "zz"`},
		"metadata of a device":        {Layer{Source: meta, Devices: []string{hashed}}, errdefs.IsInvalidArgument, "hashed.dmverity: hashoffset is 40960"},
		"hash offset":                 {Layer{Source: good, Verity: beyond}, errdefs.IsInvalidArgument, "hashoffset is 40960"},
	} {
		t.Run(name, func(t *testing.T) {
			open := len(openFiles(t))
			c.layer.Type = "erofs"
			r := &Root{Lowers: []Layer{{Type: "erofs", Source: good}, c.layer}}
			_, err := r.Open(NewDisks())
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "rootfs layer 1") {
				t.Errorf("got %v; want %q in it", err, c.want)
			}
			if now := len(openFiles(t)); now != open {
				t.Errorf("%d files are open, %d before", now, open)
			}
		})
	}
	many := &Root{}
	for range maxPartitions + 1 {
		many.Lowers = append(many.Lowers, Layer{Type: "erofs", Source: good})
	}
	if _, err := many.Open(NewDisks()); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "256 layers and devices") {
		t.Errorf("too many: %v", err)
	}
}

func openFiles(t *testing.T) []os.DirEntry {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return list
}

func FuzzErofs(f *testing.F) {
	f.Add(erofsImage(1, 0))
	f.Add(erofsImage(1, 0, erofsDevice{4096, 4096}))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := writeBytes(t, filepath.Join(t.TempDir(), "l"), data)
		for _, l := range []Layer{{Source: path}, {Source: path, Devices: []string{path}}} {
			o, err := openLayer(l)
			if err != nil {
				continue
			}
			for _, p := range o.parts {
				if p.Sectors == 0 || p.Sectors > 1<<42 {
					t.Errorf("a part of %d sectors", p.Sectors)
				}
				p.File.Close()
			}
		}
	})
}
