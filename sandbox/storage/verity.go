// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// veritySuffix makes the name of a file's dm-verity metadata (containerd internal/dmverity).
const veritySuffix = ".dmverity"

// verity is what containerd's erofs differ writes beside a layer with a hash tree
// (containerd internal/dmverity, layer.erofs.dmverity).
type verity struct {
	RootHash   string `json:"roothash"`
	HashOffset uint64 `json:"hashoffset"`
}

// verityOf reads the metadata of a layer's file number i, if there is any.
func verityOf(l Layer, i int, f *os.File) (verity, error) {
	path := l.Verity
	if i > 0 || path == "" {
		if len(l.Devices) == 0 {
			return verity{}, nil
		}
		path = f.Name() + veritySuffix
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return verity{}, nil
		}
	}
	size, err := sizeOf(f)
	if err != nil {
		return verity{}, err
	}
	return readVerity(path, size)
}

// readVerity reads the metadata of a layer that has size bytes.
func readVerity(path string, size uint64) (v verity, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return v, fmt.Errorf("dm-verity metadata: %w", typed(err))
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return v, fmt.Errorf("dm-verity metadata %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if len(v.RootHash) == 0 || len(v.RootHash)%2 != 0 || strings.Trim(v.RootHash, "0123456789abcdef") != "" {
		return v, fmt.Errorf("dm-verity metadata %s: roothash is %q: want hexadecimal digits: %w", path, v.RootHash, errdefs.ErrInvalidArgument)
	}
	if v.HashOffset == 0 || v.HashOffset >= size || v.HashOffset%hypervisor.SectorBytes != 0 {
		return v, fmt.Errorf("dm-verity metadata %s: hashoffset is %d: want a multiple of %d within the layer's %d bytes: %w",
			path, v.HashOffset, hypervisor.SectorBytes, size, errdefs.ErrInvalidArgument)
	}
	return v, nil
}

// after is a partition's number for the guest, with the hash tree in it.
func (v verity) after(partition int) string {
	if v.RootHash == "" {
		return strconv.Itoa(partition)
	}
	return fmt.Sprintf("%d:%s:%d", partition, v.RootHash, v.HashOffset)
}
