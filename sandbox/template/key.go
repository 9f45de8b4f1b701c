// SPDX-License-Identifier: Apache-2.0

package template

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Fact is one thing that a template depends on.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// File is the path when the fact is about a file.
	File string `json:"file,omitempty"`
}

// Key is everything that a template depends on: two machines of the same key can
// be clones of one.
type Key []Fact

// Add notes a fact.
func (k *Key) Add(name string, value any) {
	*k = append(*k, Fact{Name: name, Value: fmt.Sprint(value)})
}

// AddFile notes which file it is: one that is replaced or written is another.
func (k *Key) AddFile(name, path string) error {
	if path == "" {
		return nil
	}
	value, err := fileValue(path)
	if err != nil {
		return err
	}
	*k = append(*k, Fact{Name: name, Value: value, File: path})
	return nil
}

func fileValue(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return fmt.Sprintf("%s %d bytes, inode %d:%d, changed %d.%09d", path, st.Size, st.Dev, st.Ino, st.Ctim.Sec, st.Ctim.Nsec), nil
}

// Stale tells whether a file of the key is not there any more as it was, so that
// no machine of this key will start again.
func (k Key) Stale() bool {
	for _, f := range k {
		if f.File == "" {
			continue
		}
		if now, err := fileValue(f.File); err != nil || now != f.Value {
			return true
		}
	}
	return false
}

// AddCPU notes the host's CPU: model, features and microcode.
func (k *Key) AddCPU() error {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(b), "\n\n")
	h := sha256.New()
	for line := range strings.Lines(first) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags", "vmx flags", "bugs":
			fmt.Fprintln(h, strings.TrimSpace(name), strings.TrimSpace(value))
		}
	}
	k.Add("host CPU", hex.EncodeToString(h.Sum(nil)[:8]))
	return nil
}

// Differs says what of two keys is not the same, the other one's values after this
// one's; empty when nothing is.
func (k Key) Differs(o Key) (out []string) {
	others := map[string]string{}
	for _, f := range o {
		others[f.Name] = f.Value
	}
	for _, f := range k {
		if v, ok := others[f.Name]; !ok || v != f.Value {
			out = append(out, fmt.Sprintf("%s was %q and is %q", f.Name, f.Value, v))
		}
		delete(others, f.Name)
	}
	for _, f := range o {
		if v, ok := others[f.Name]; ok {
			out = append(out, fmt.Sprintf("%s is %q and was not there", f.Name, v))
		}
	}
	return out
}

// Digest names the template: 128 bits in hexadecimal.
func (k Key) Digest() string {
	h := sha256.New()
	for _, f := range k {
		fmt.Fprintf(h, "%d %s %d %s\n", len(f.Name), f.Name, len(f.Value), f.Value)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
