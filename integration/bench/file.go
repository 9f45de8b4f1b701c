// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// Fact is a line above the table: what the figures depend on.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Failure is a probe without figures: one sample of it failed.
type Failure struct {
	// Rows are what is missing, as name/runtime.
	Rows  []string `json:"rows"`
	Error string   `json:"error"`
}

// Report is a run, whole or as far as it came. Its JSON form is the file that
// other programs read.
type Report struct {
	Facts []Fact `json:"facts"`
	// Complete says that every row that was asked for has its samples.
	Complete bool      `json:"complete"`
	Failed   []Failure `json:"failed,omitempty"`
	// Short are the rows that have fewer samples than were asked for, none included.
	Short   []Short  `json:"short,omitempty"`
	Results []Result `json:"results"`
}

// factPrograms is the fact that tells builds apart.
const factPrograms = "programs"

// sameFacts are those in which a run and the one that goes on with it must agree.
var sameFacts = []string{factPrograms, "guest kernel", "QEMU", "containerd"}

func (r *Report) fact(name string) string {
	i := slices.IndexFunc(r.Facts, func(f Fact) bool { return f.Name == name })
	if i < 0 {
		return ""
	}
	return r.Facts[i].Value
}

// samples are the measured ones. Those of failed probes and of rows that were
// made of others are not among them.
func (r *Report) samples() map[Row][]float64 {
	out := map[Row][]float64{}
	for _, res := range r.Results {
		if res.From == "" && res.Unit != Megabytes {
			out[res.Row()] = res.Samples
		}
	}
	return out
}

// resumable tells why a run with these facts cannot go on with the report.
func (r *Report) resumable(facts []Fact) error {
	now := Report{Facts: facts}
	for _, name := range sameFacts {
		if was, is := r.fact(name), now.fact(name); was != is {
			return fmt.Errorf("bench: resume: %s was %q and is %q now: figures of both do not belong into one table", name, was, is)
		}
	}
	return nil
}

// WriteFile writes the report to path, whole or not at all.
func (r *Report) WriteFile(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	return writeWhole(path, append(b, '\n'))
}

// ReadFile reads what WriteFile wrote.
func ReadFile(path string) (*Report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("bench: results: %w", err)
	}
	r := &Report{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("bench: results: %s: %w", path, err)
	}
	for _, res := range r.Results {
		if len(res.Samples) == 0 {
			return nil, fmt.Errorf("bench: results: %s: %s/%s has no samples", path, res.Name, res.Runtime)
		}
	}
	return r, nil
}

func writeWhole(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	tmp := path + ".tmp"
	defer os.Remove(tmp)
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("bench: results: %w", err)
	}
	return nil
}
