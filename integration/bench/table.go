// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Report is a finished run.
type Report struct {
	Results []Result
	facts   []fact
}

// WriteTable prints what was measured in, one line for each row with its ratios,
// and the figures to reach.
func (r *Report) WriteTable(w io.Writer) error {
	var b strings.Builder
	for _, f := range r.facts {
		fmt.Fprintf(&b, "%-18s %s\n", f.name, f.value)
	}
	b.WriteByte('\n')
	refs := references(r.Results)
	head := []string{"name", "runtime", "n", "median", "min", "max", "unit"}
	for _, ref := range refs {
		head = append(head, "× "+ref)
	}
	grid := [][]string{head}
	for _, res := range r.Results {
		line := []string{res.Name, res.Runtime, strconv.Itoa(res.N), number(res.Median), number(res.Min), number(res.Max), string(res.Unit)}
		for _, ref := range refs {
			cell := ""
			if v, ok := res.VS[ref]; ok {
				cell = fmt.Sprintf("%.2f", v)
			}
			line = append(line, cell)
		}
		grid = append(grid, line)
	}
	b.WriteString(align(grid))
	b.WriteString("\n" + judge(r.Results))
	_, err := io.WriteString(w, b.String())
	return err
}

// references are the rows and runtimes that anything is compared with, BaseRow first.
func references(results []Result) []string {
	var refs []string
	for _, r := range results {
		for ref := range r.VS {
			if !slices.Contains(refs, ref) {
				refs = append(refs, ref)
			}
		}
	}
	slices.SortFunc(refs, func(a, b string) int {
		if (a == BaseRow) != (b == BaseRow) {
			if a == BaseRow {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	return refs
}

// number prints three to four significant digits of what may be 0.01 or 10000.
func number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 1:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 4, 64)
}

// align pads the columns: words to the left, numbers to the right.
func align(grid [][]string) string {
	widths := make([]int, len(grid[0]))
	for _, line := range grid {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, line := range grid {
		var out strings.Builder
		for i, cell := range line {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if grid[0][i] == "name" || grid[0][i] == "runtime" || grid[0][i] == "unit" {
				out.WriteString(cell + pad + "  ")
			} else {
				out.WriteString(pad + cell + "  ")
			}
		}
		b.WriteString(strings.TrimRight(out.String(), " ") + "\n")
	}
	return b.String()
}
