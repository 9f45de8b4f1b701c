// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"strconv"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// layered is an image of layers of which number N holds the file /layers/N with
// its number in it, and its own /top.
func layered(name string, layers int) lab.Image {
	img := lab.Image{Name: name, Cmd: []string{"sh"}}
	for i := range layers {
		own := "" // images share no layer
		if i == 0 {
			own = name
		}
		n := []byte(strconv.Itoa(i + 1))
		img.Layers = append(img.Layers, []lab.File{
			{Path: "layers/" + string(n), Mode: 0o644, Data: n}, {Path: "top", Mode: 0o644, Data: n}, {Path: "image", Mode: 0o644, Data: []byte(own)},
		})
	}
	return img
}

// onBusybox puts the lab's busybox image below the layers of another.
func onBusybox(t *testing.T, img lab.Image) lab.Image {
	t.Helper()
	base, err := lab.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	img.Env = base.Env
	img.Layers = append(base.Layers[:len(base.Layers):len(base.Layers)], img.Layers...)
	return img
}
