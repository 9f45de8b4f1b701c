// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// apply stores a parsed file into c. Keys that have no effect are collected
// into one warning.
func apply(c *Config, name string, entries []entry) ([]Warning, error) {
	seen := map[string]int{}
	var idle []string
	first := 0
	for _, e := range entries {
		table := strings.Join(e.table, ".")
		if e.key == "" {
			if err := checkTable(table); err != nil {
				return nil, fmt.Errorf("%s:%d: %w", name, e.line, err)
			}
			continue
		}
		full := table + "." + e.key
		if prev, dup := seen[full]; dup && !ignoredTable(table) {
			return nil, fmt.Errorf("%s:%d: %s is set a second time; it was set in line %d", name, e.line, e.key, prev)
		}
		seen[full] = e.line
		noted, err := applyEntry(c, table, e)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, e.line, err)
		}
		if noted {
			if first == 0 {
				first = e.line
			}
			idle = append(idle, fmt.Sprintf("%s (line %d)", full, e.line))
			continue
		}
		c.origin[full] = fmt.Sprintf("%s:%d", name, e.line)
	}
	if idle == nil {
		return nil, nil
	}
	return []Warning{{Source: name, Line: first, Text: "known from Kata Containers and without effect here: " + strings.Join(idle, ", ")}}, nil
}

// applyEntry sets one key; noted reports that the key is known and has no effect.
func applyEntry(c *Config, table string, e entry) (noted bool, err error) {
	if f := lookup(table, e.key); f != nil {
		return false, f.set(c, e.value)
	}
	if ignoredTable(table) {
		return true, nil
	}
	if k, ok := upstream[table][e.key]; ok {
		return k.check(e.key, e.value)
	}
	if err := checkTable(table); err != nil {
		return false, fmt.Errorf("unknown key %s: %w", e.key, err)
	}
	return false, unknownKey(table, e.key)
}

// checkTable accepts the tables of the schema, their parents, and those of
// Kata Containers that have no effect.
func checkTable(table string) error {
	if ignoredTable(table) {
		return nil
	}
	if _, ok := upstream[table]; ok {
		return nil
	}
	var names []string
	for _, s := range schema() {
		names = append(names, s.name)
		if table == s.name || strings.HasPrefix(s.name, table+".") {
			return nil
		}
	}
	if strings.HasPrefix(table, "hypervisor.") && !strings.HasPrefix(table, "hypervisor.qemu.") {
		return fmt.Errorf("[%s] is not supported; the hypervisor of this build is [hypervisor.qemu]", table)
	}
	if table == "" {
		return fmt.Errorf("it stands in no section; the sections are [%s]", strings.Join(names, "], ["))
	}
	return fmt.Errorf("unknown section [%s]; the nearest is [%s]", table, nearest(table, names))
}

func unknownKey(table, key string) error {
	var here []string
	for _, s := range schema() {
		for _, f := range s.fields {
			if f.key == key {
				return fmt.Errorf("unknown key %s in [%s]; it belongs in [%s]", key, table, s.name)
			}
			if s.name == table {
				here = append(here, f.key)
			}
		}
	}
	if len(here) == 0 { // a parent such as [hypervisor], or a table without effect
		here = slices.Collect(maps.Keys(upstream[table]))
	}
	if len(here) == 0 {
		return fmt.Errorf("unknown key %s in [%s], which holds only tables", key, table)
	}
	return fmt.Errorf("unknown key %s in [%s]; the nearest key is %s", key, table, nearest(key, here))
}

// nearest returns the candidate with the least edit distance, the first in
// alphabetical order of equals.
func nearest(s string, candidates []string) string {
	best, least := "", 1<<30
	for _, c := range slices.Sorted(slices.Values(candidates)) {
		if d := distance(s, c); d < least {
			best, least = c, d
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, diag+1)
		}
	}
	return row[len(b)]
}
