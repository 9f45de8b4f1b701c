// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Version is the format that this build writes.
const Version = 1

// names of this package's files in a sandbox's directory.
const (
	ledgerFile = "ledger"
	lockFile   = "lock"
)

// Proc identifies a process: Start is its start time in clock ticks since boot,
// which a later process with the same pid does not share.
type Proc struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// Meta is what a ledger's header says about its sandbox.
type Meta struct {
	// Sandbox id, containerd Namespace and absolute Bundle directory.
	Sandbox   string `json:"sandbox"`
	Namespace string `json:"namespace"`
	Bundle    string `json:"bundle"`
	// Shim is the process that holds the lock. Create and Adopt fill it in.
	Shim Proc `json:"shim"`
	// Created is when; Create fills it in.
	Created time.Time `json:"created"`
	// Build is the version of the shim that wrote the header.
	Build string `json:"build"`
	// Boot is the kernel's boot id; Create fills it in.
	Boot string `json:"boot"`
}

// header is the first line.
type header struct {
	Ledger int `json:"ledger"`
	Meta
}

// line is any other line.
type line struct {
	Add   uint64 `json:"add,omitempty"`
	Del   uint64 `json:"del,omitempty"`
	Owner *Proc  `json:"owner,omitempty"`
	*Entry
}

// Numbered is a live entry with its number.
type Numbered struct {
	N uint64
	Entry
}

// content is a ledger as read back.
type content struct {
	version int
	meta    Meta
	// live entries in the order they were recorded.
	live []Numbered
	last uint64
	// complete is the length up to and including the last newline.
	complete int64
}

// read parses a ledger file. A missing or empty one is a sandbox that was killed
// before or after it had anything: no error, no entries.
func read(dir string) (content, error) {
	data, err := os.ReadFile(filepath.Join(dir, ledgerFile))
	if errors.Is(err, os.ErrNotExist) {
		return content{version: Version}, nil
	}
	if err != nil {
		return content{}, fmt.Errorf("ledger: %w", err)
	}
	return parse(data)
}

func parse(data []byte) (content, error) {
	c := content{version: Version, complete: int64(bytes.LastIndexByte(data, '\n') + 1)}
	lines := bytes.SplitAfter(data[:c.complete], []byte("\n"))
	if c.complete == 0 {
		return c, nil
	}
	var h header
	if err := json.Unmarshal(lines[0], &h); err != nil || h.Ledger < 1 {
		return c, fmt.Errorf("ledger: the first line is not a ledger's header: %.80q", lines[0])
	}
	c.version, c.meta = h.Ledger, h.Meta
	for _, raw := range lines[1:] {
		l := line{Entry: &Entry{}}
		if json.Unmarshal(raw, &l) != nil {
			continue // torn; see doc.go
		}
		switch {
		case l.Add != 0:
			c.live = append(c.live, Numbered{N: l.Add, Entry: *l.Entry})
			c.last = max(c.last, l.Add)
		case l.Del != 0:
			c.live = slices.DeleteFunc(c.live, func(n Numbered) bool { return n.N == l.Del })
		case l.Owner != nil:
			c.meta.Shim = *l.Owner
		}
	}
	return c, nil
}

// bootID returns the kernel's boot id.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("ledger: boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
