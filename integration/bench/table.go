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

// WriteTable prints what was measured in, one line for each row with its ratios,
// what failed, and the figures to reach.
func (r *Report) WriteTable(w io.Writer) error {
	var b strings.Builder
	for _, f := range r.Facts {
		fmt.Fprintf(&b, "%-18s %s\n", f.Name, f.Value)
	}
	b.WriteByte('\n')
	columns := []string{BaseRow, Runc}
	columns = slices.DeleteFunc(columns, func(ref string) bool {
		return !slices.ContainsFunc(r.Results, func(res Result) bool { _, ok := res.VS[ref]; return ok })
	})
	head := []string{"name", "runtime", "n", "median", "min", "max", "unit"}
	for _, ref := range columns {
		head = append(head, "× "+ref)
	}
	grid := [][]string{append(head, "× others")}
	for _, res := range r.Results {
		line := []string{res.Name, res.Runtime, strconv.Itoa(res.N), number(res.Median), number(res.Min), number(res.Max), string(res.Unit)}
		for _, ref := range columns {
			line = append(line, res.ratio(ref))
		}
		grid = append(grid, append(line, res.otherRatios(columns)))
	}
	b.WriteString(align(grid))
	for _, f := range r.Failed {
		fmt.Fprintf(&b, "\nno figures of %s: %s\n", strings.Join(f.Rows, ", "), f.Error)
	}
	if len(r.Short) > 0 {
		b.WriteString("\n" + shortages(r.Short) + "-resume goes on with it\n")
	}
	b.WriteString("\n" + judge(r.Results))
	_, err := io.WriteString(w, b.String())
	return err
}

// ratio prints a ratio with its spread, nothing where there is none.
func (r Result) ratio(ref string) string {
	v, ok := r.VS[ref]
	if !ok {
		return ""
	}
	s, ok := r.Spread[ref]
	if !ok {
		return twoDecimals(v)
	}
	return fmt.Sprintf("%s (%s–%s)", twoDecimals(v), twoDecimals(s[0]), twoDecimals(s[1]))
}

// otherRatios are those that have no column, each with what it is compared with.
func (r Result) otherRatios(columns []string) string {
	var refs []string
	for ref := range r.VS {
		if !slices.Contains(columns, ref) {
			refs = append(refs, ref)
		}
	}
	slices.Sort(refs)
	for i, ref := range refs {
		refs[i] = r.ratio(ref) + " " + ref
	}
	return strings.Join(refs, ", ")
}

func twoDecimals(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) }

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

// wordColumns are those that begin at the left.
var wordColumns = []string{"name", "runtime", "unit", "verdict", "× others"}

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
			if slices.Contains(wordColumns, grid[0][i]) {
				out.WriteString(cell + pad + "  ")
			} else {
				out.WriteString(pad + cell + "  ")
			}
		}
		b.WriteString(strings.TrimRight(out.String(), " ") + "\n")
	}
	return b.String()
}
