// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// busyboxLayers are the layers of the lab's busybox image.
func busyboxLayers(t *testing.T) [][]lab.File {
	t.Helper()
	img, err := lab.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	return img.Layers
}
