// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"
)

// field is one key of the schema, read from the struct tags once.
type field struct {
	section, key string
	doc          string
	index        []int
	typ          reflect.Type
	def          string
	enum         []string
	min, max     int64
	ranged       bool
	path         string
	annotation   string
	valid        string
	merge, sep   string
}

// section is one table of the file.
type section struct {
	name, doc string
	fields    []*field
}

var durationType = reflect.TypeFor[time.Duration]()

// schema walks Config's tags. A bad tag is a programming error: it panics, and
// every test of the package sees it.
var schema = sync.OnceValue(func() []*section {
	var out []*section
	root := reflect.TypeFor[Config]()
	for i := range root.NumField() {
		sf := root.Field(i)
		name := sf.Tag.Get("section")
		if name == "" {
			continue
		}
		s := &section{name: name, doc: sf.Tag.Get("doc")}
		for j := range sf.Type.NumField() {
			s.fields = append(s.fields, newField(name, sf.Type.Field(j), []int{i, j}))
		}
		out = append(out, s)
	}
	return out
})

func newField(section string, sf reflect.StructField, index []int) *field {
	t := sf.Tag
	f := &field{
		section: section, key: t.Get("toml"), doc: t.Get("doc"), index: index, typ: sf.Type,
		def: t.Get("default"), path: t.Get("path"), annotation: t.Get("annotation"),
		valid: t.Get("valid"), merge: t.Get("merge"), sep: t.Get("sep"),
	}
	if f.key == "" || f.doc == "" {
		panic("config: " + sf.Name + " needs the tags toml and doc")
	}
	if f.annotation == "=" {
		f.annotation = f.key
	}
	if e := t.Get("enum"); e != "" {
		f.enum = strings.Split(e, ",")
	}
	if lo, ok := t.Lookup("min"); ok {
		f.ranged, f.min, f.max = true, mustInt(lo), mustInt(t.Get("max"))
	}
	if sf.Type == durationType && t.Get("unit") != "s" {
		panic("config: " + sf.Name + " needs the tag unit:\"s\"")
	}
	return f
}

func mustInt(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		panic("config: bad number in a tag: " + err.Error())
	}
	return n
}

// name is "section.key".
func (f *field) name() string { return f.section + "." + f.key }

// what says which values are right, for error messages and the documentation.
func (f *field) what() string {
	switch {
	case f.enum != nil:
		return "one of " + quoteList(f.enum)
	case f.path != "":
		return "an absolute path"
	case f.typ == durationType:
		return fmt.Sprintf("a whole number of seconds from %d to %d", f.min, f.max)
	}
	switch f.typ.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "an array of strings"
	default:
		return fmt.Sprintf("a whole number from %d to %d", f.min, f.max)
	}
}

func quoteList(s []string) string {
	q := make([]string, len(s))
	for i, v := range s {
		q[i] = strconv.Quote(v)
	}
	return strings.Join(q, ", ")
}

// set stores v, a string, bool, int64 or []string, into c. The error says only
// what is wrong; the caller adds where.
func (f *field) set(c *Config, v any) error {
	dst := reflect.ValueOf(c).Elem().FieldByIndex(f.index)
	bad := func() error { return fmt.Errorf("%s is %s, not %s", f.key, f.what(), describe(v)) }
	switch x := v.(type) {
	case string:
		if dst.Kind() != reflect.String || !f.stringOK(x) {
			return bad()
		}
		dst.SetString(x)
	case bool:
		if dst.Kind() != reflect.Bool {
			return bad()
		}
		dst.SetBool(x)
	case int64:
		if !f.ranged || x < f.min || x > f.max {
			return bad()
		}
		if f.typ == durationType {
			x *= int64(time.Second)
		}
		dst.SetInt(x)
	case []string:
		if dst.Kind() != reflect.Slice {
			return bad()
		}
		dst.Set(reflect.ValueOf(x))
	default:
		return bad()
	}
	return nil
}

func (f *field) stringOK(s string) bool {
	if strings.ContainsAny(s, "\x00\n") {
		return false
	}
	if f.path != "" && s != "" && !strings.HasPrefix(s, "/") {
		return false
	}
	if f.enum == nil {
		return true
	}
	for _, e := range f.enum {
		if s == e {
			return true
		}
	}
	return false
}

// describe shows a value as its writer wrote it.
func describe(v any) string {
	switch x := v.(type) {
	case string:
		return strconv.Quote(x)
	case []string:
		return "[" + quoteList(x) + "]"
	case other:
		return string(x)
	}
	return fmt.Sprint(v)
}

// parseText reads a value written as plain text: a default tag or an annotation.
func (f *field) parseText(s string) (any, error) {
	switch {
	case f.typ.Kind() == reflect.String:
		return s, nil
	case f.typ.Kind() == reflect.Bool:
		switch s {
		case "true":
			return true, nil
		case "false":
			return false, nil
		}
	case f.typ.Kind() == reflect.Slice:
		return f.parseList(s)
	default:
		if n, err := strconv.ParseInt(s, 10, 64); err == nil {
			return n, nil
		}
	}
	return nil, fmt.Errorf("%s is %s, not %q", f.key, f.what(), s)
}

// defaults returns the built-in configuration.
func defaults() *Config {
	c := &Config{origin: map[string]string{}}
	for _, s := range schema() {
		for _, f := range s.fields {
			v, err := f.parseText(f.def)
			if err == nil {
				err = f.set(c, v)
			}
			if err != nil {
				panic("config: default: " + err.Error())
			}
		}
	}
	return c
}

// lookup finds a key, or nil.
func lookup(section, key string) *field {
	for _, s := range schema() {
		if s.name != section {
			continue
		}
		for _, f := range s.fields {
			if f.key == key {
				return f
			}
		}
	}
	return nil
}
