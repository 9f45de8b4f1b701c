// SPDX-License-Identifier: Apache-2.0

package devices

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

func tree(t *testing.T, dirs ...string) *Finder {
	t.Helper()
	root := t.TempDir()
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return &Finder{Sys: filepath.Join(root, "sys"), Dev: filepath.Join(root, "dev"), Timeout: 20 * time.Millisecond}
}

func TestByPCIPath(t *testing.T) {
	const bridge = "sys/devices/pci0000:00/0000:00:02.0"
	f := tree(t,
		bridge+"/0000:01:03.0/virtio5/block/vdb", "dev/vdb",
		"sys/devices/pci0000:00/0000:00:05.0/virtio1/net/eth7",
		"sys/devices/pci0000:20/0000:20:00.0/0000:21:02.0/virtio9/block/vdc", "dev/vdc",
		"sys/devices/pci0000:00/0000:00:1f.2/nvme/nvme0/nvme0n1", "dev/nvme0n1",
	)
	ctx := context.Background()
	for path, want := range map[string]string{"02/03": "vdb", "20/00/02": "vdc", "1f.2": "nvme0n1"} {
		got, err := f.BlockByPCI(ctx, path)
		if err != nil || filepath.Base(got) != want {
			t.Errorf("%s: %q, %v; want %s", path, got, err, want)
		}
	}
	if got, err := f.NetByPCI(ctx, "05"); err != nil || got != "eth7" {
		t.Errorf("net: %q, %v", got, err)
	}
	for _, bad := range []string{"", "zz", "02/", "02.9", "../x"} {
		if _, err := f.BlockByPCI(ctx, bad); fault.KindOf(err) != fault.InvalidArgument {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestAbsentDeviceTimesOut(t *testing.T) {
	f := tree(t, "sys", "dev")
	_, err := f.BlockByPCI(context.Background(), "02/03")
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "02/03") {
		t.Errorf("got %v", err)
	}
	if _, err := f.BlockByName(context.Background(), "/dev/../etc/passwd"); fault.KindOf(err) != fault.InvalidArgument {
		t.Errorf("got %v", err)
	}
}

func TestBlockGrown(t *testing.T) {
	f := tree(t, "sys/dev/block/254:16", "dev")
	if err := os.WriteFile(filepath.Join(f.Sys, "dev/block/254:16/size"), []byte("4096\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := f.BlockGrown(ctx, unix.Mkdev(254, 16), 4096*512); err != nil {
		t.Error(err)
	}
	if err := f.BlockGrown(ctx, unix.Mkdev(254, 16), 4096*512+1); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "254:16") {
		t.Errorf("a disk that stays too small: %v", err)
	}
	if err := f.BlockGrown(ctx, unix.Mkdev(254, 17), 1); err == nil {
		t.Error("a disk that is not there has grown")
	}
}
