// SPDX-License-Identifier: Apache-2.0

package directvolume

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestRegister(t *testing.T) {
	root := filepath.Join(t.TempDir(), "direct-volumes")
	const volume = "/var/lib/kubelet/pods/0b5e/volumes/kubernetes.io~csi/pvc/mount"
	const text = `{"volume-type":"block","device":"/dev/sdf","fstype":"ext4","metadata":{"fsGroup":"2000"},"options":["ro"]}`
	if m, err := Load(root, volume); m != nil || err != nil {
		t.Errorf("not registered: %v, %v", m, err)
	}
	m, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := Add(root, volume, m); err != nil {
		t.Fatal(err)
	}
	// The place and the content that upstream's programs read and write.
	const name = "L3Zhci9saWIva3ViZWxldC9wb2RzLzBiNWUvdm9sdW1lcy9rdWJlcm5ldGVzLmlvfmNzaS9wdmMvbW91bnQ="
	if data, err := os.ReadFile(filepath.Join(root, name, "mountInfo.json")); err != nil || string(data) != text {
		t.Errorf("%s, %v", data, err)
	}
	got, err := Load(root, volume)
	if err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%+v, %v", got, err)
	}
	for range 2 {
		if err := Use(root, volume, "pod1"); err != nil {
			t.Fatal(err)
		}
	}
	if users, err := Users(root, volume); err != nil || !reflect.DeepEqual(users, []string{"pod1"}) {
		t.Errorf("%v, %v", users, err)
	}
	for range 2 {
		if err := Leave(root, volume, "pod1"); err != nil {
			t.Fatal(err)
		}
	}
	if users, err := Users(root, volume); err != nil || len(users) != 0 {
		t.Errorf("%v, %v", users, err)
	}
	if err := Remove(root, volume); err != nil {
		t.Fatal(err)
	}
	if err := Remove(root, volume); !errdefs.IsNotFound(err) {
		t.Errorf("again: %v", err)
	}
	if _, err := Users(root, volume); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}

func TestBadMountInfo(t *testing.T) {
	for text, want := range map[string]string{
		`{`: "mount info",
		`{"volume-type":"spdk","device":"/dev/x","fstype":"ext4"}`:                                                 "volume-type",
		`{"volume-type":"block","device":"sdf","fstype":"ext4"}`:                                                   "device",
		`{"volume-type":"block","device":"/dev/x"}`:                                                                "fstype",
		`{"volume-type":"block","device":"/dev/x","fstype":"../x"}`:                                                "fstype",
		`{"volume-type":"block","device":"/dev/x","fstype":"ext4","metadata":{"fsGroup":"-1"}}`:                    "metadata.fsGroup",
		`{"volume-type":"block","device":"/dev/x","fstype":"ext4","metadata":{"fsGroupChangePolicy":"Sometimes"}}`: "metadata.fsGroupChangePolicy",
	} {
		if _, err := Parse([]byte(text)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	m := &MountInfo{VolumeType: TypeBlock, Device: "/dev/x", FSType: "ext4"}
	for _, volume := range []string{"relative", "/" + strings.Repeat("x", 200)} {
		if err := Add(t.TempDir(), volume, m); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", volume, err)
		}
	}
}
