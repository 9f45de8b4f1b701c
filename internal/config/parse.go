// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// entry is one "key = value" of a file, or, when value is nil, the header of a table.
type entry struct {
	table []string // the table it stands in
	key   string
	line  int
	value any // string, bool, int64, []string or other
}

// other is a value of a type that no key has, as source text.
type other string

// maxFile bounds a configuration file. It is far above any real one.
const maxFile = 1 << 20

// parser flattens a TOML document: inline tables and dotted keys become entries
// of the table they stand for.
type parser struct {
	name string
	p    unstable.Parser
	out  []entry
}

// parse reads a document; name is what errors call it.
func parse(name string, data []byte) ([]entry, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes, which no configuration is", name, maxFile)
	}
	ps := &parser{name: name}
	ps.p.Reset(data)
	var table []string
	for ps.p.NextExpression() {
		n := ps.p.Expression()
		switch n.Kind {
		case unstable.Table, unstable.ArrayTable:
			var line int
			table, line = ps.keys(n.Key())
			ps.out = append(ps.out, entry{table: table, line: line})
		case unstable.KeyValue:
			ps.keyValue(table, n)
		}
	}
	if err := ps.p.Error(); err != nil {
		return nil, ps.syntaxError(err, data)
	}
	return ps.out, nil
}

func (ps *parser) keys(it unstable.Iterator) (parts []string, line int) {
	for it.Next() {
		n := it.Node()
		if line == 0 {
			line = ps.line(n.Raw)
		}
		parts = append(parts, string(n.Data))
	}
	return parts, line
}

func (ps *parser) line(r unstable.Range) int { return ps.p.Shape(r).Start.Line }

func (ps *parser) keyValue(table []string, n *unstable.Node) {
	parts, line := ps.keys(n.Key())
	full := append(append([]string{}, table...), parts[:len(parts)-1]...)
	key, v := parts[len(parts)-1], n.Value()
	if v.Kind == unstable.InlineTable {
		full = append(full, key)
		ps.out = append(ps.out, entry{table: full, line: line})
		for it := v.Children(); it.Next(); {
			ps.keyValue(full, it.Node())
		}
		return
	}
	ps.out = append(ps.out, entry{table: full, key: key, line: line, value: ps.value(v)})
}

func (ps *parser) value(n *unstable.Node) any {
	switch n.Kind {
	case unstable.String:
		return string(n.Data)
	case unstable.Bool:
		return string(n.Data) == "true"
	case unstable.Integer:
		// Base 0 understands TOML's 0x, 0o, 0b and underscores.
		if i, err := strconv.ParseInt(string(n.Data), 0, 64); err == nil {
			return i
		}
		return other("a number beyond 64 bits")
	case unstable.Array:
		list := []string{}
		for it := n.Children(); it.Next(); {
			e := it.Node()
			if e.Kind != unstable.String {
				return other("an array with " + article(e.Kind))
			}
			list = append(list, string(e.Data))
		}
		return list
	}
	return other(article(n.Kind))
}

func article(k unstable.Kind) string {
	s := strings.ToLower(k.String())
	if strings.IndexByte("aeiou", s[0]) >= 0 {
		return "an " + s
	}
	return "a " + s
}

func (ps *parser) syntaxError(err error, data []byte) error {
	line := 1 + strings.Count(string(data), "\n")
	var pe *unstable.ParserError
	// An empty highlight at the very end has no position of its own.
	if errors.As(err, &pe) && len(pe.Highlight) > 0 {
		line = ps.line(ps.p.Range(pe.Highlight))
	}
	return fmt.Errorf("%s:%d: not valid TOML: %w", ps.name, line, err)
}
