// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/kata-v2/kata/images"
)

// shimFile is the shim's program in Options.Bin.
const shimFile = "containerd-shim-kata-v2"

// The rows of file sizes: the shim's program, and what the guest unpacks as its root.
const (
	shimSizeRow      = "shim-size"
	guestRootSizeRow = "guest-root-size"
)

// sizes are the rows that need no repetition.
func sizes(o Options) ([]Result, error) {
	var out []Result
	for _, f := range []struct{ row, path string }{
		{shimSizeRow, filepath.Join(o.Bin, shimFile)},
		{guestRootSizeRow, filepath.Join(o.Images, images.InitrdFile)},
	} {
		st, err := os.Stat(f.path)
		if err != nil {
			return nil, fmt.Errorf("bench: %s: %w", f.row, err)
		}
		out = append(out, summarize(Row{f.row, Kata, Megabytes}, []float64{float64(st.Size()) / 1e6}))
	}
	return out, nil
}
