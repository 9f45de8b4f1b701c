// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"fmt"
	"strings"
)

// row is one check's result.
type row struct {
	check, note string
	failed      bool
}

// noteLength bounds a row's note, in bytes; the whole reason is in the test's output.
const noteLength = 200

// fail marks the row; the first reason stays.
func (r *row) fail(reason string) {
	if !r.failed {
		r.failed, r.note = true, reason
	}
}

// table collects rows; checks run one after the other.
type table struct{ rows []row }

func (t *table) add(r row) { t.rows = append(t.rows, r) }

func (t *table) passed() (n int) {
	for _, r := range t.rows {
		if !r.failed {
			n++
		}
	}
	return n
}

// markdown is the table for docs/kubernetes.md.
func (t *table) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d checks pass.\n\n| check | result | note |\n|--|--|--|\n", t.passed(), len(t.rows))
	for _, r := range t.rows {
		result := "pass"
		if r.failed {
			result = "**fail**"
		}
		note := strings.ReplaceAll(strings.Join(strings.Fields(r.note), " "), "|", `\|`)
		if len(note) > noteLength {
			note = strings.ToValidUTF8(note[:noteLength], "") + " …"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", r.check, result, note)
	}
	return b.String()
}
