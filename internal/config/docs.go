// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"
)

//go:generate go test . -run TestDocsAreCurrent -update

// Markdown is docs/configuration.md, written from the schema.
func Markdown() string {
	var b strings.Builder
	b.WriteString(`# Configuration

This page is generated from the schema in internal/config; "go generate ./internal/config" writes it anew.

The shim reads the first that exists of: the file named by containerd's ConfigPath option, the file named by
$` + EnvFile + `, ` + strings.Join(searchPaths, ", ") + `. Without any, the defaults below hold.
Then every *.toml in config.d/ beside that file is read in lexical order; later values win. A config_body given by containerd replaces all files.
Pod annotations come last, those only that enable_annotations allows.

An unknown key, a wrong type or a value out of range is an error that names file, line and key.
`)
	for _, s := range schema() {
		fmt.Fprintf(&b, "\n## [%s]\n\n%s\n\n| key | default | value | meaning |\n|--|--|--|--|\n", s.name, s.doc)
		for _, f := range s.fields {
			fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", f.key, f.tomlDefault(), cell(f.what()), cell(f.doc))
		}
	}
	b.WriteString("\n## Pod annotations\n\n| annotation | key |\n|--|--|\n")
	for _, group := range []string{"hypervisor", "agent", "runtime"} {
		for _, s := range schema() {
			for _, f := range s.fields {
				if s.name == annotationSections[group] && f.annotation != "" {
					fmt.Fprintf(&b, "| `%s%s.%s` | `%s`%s |\n", AnnotationPrefix, group, f.annotation, f.key, f.annotationNote())
				}
			}
		}
	}
	b.WriteString("\n## Keys of Kata Containers without effect here\n\nThey are accepted with a warning, unless the table names the one value that is accepted.\n\n| section | key | accepted |\n|--|--|--|\n")
	for _, sec := range slices.Sorted(maps.Keys(upstream)) {
		for _, key := range slices.Sorted(maps.Keys(upstream[sec])) {
			accepted := "any value, with a warning"
			if k := upstream[sec][key]; k.only != nil {
				accepted = "`" + describe(k.only) + "` only: " + k.why
			}
			fmt.Fprintf(&b, "| %s | `%s` | %s |\n", sec, key, accepted)
		}
	}
	b.WriteString("\nThe tables [image], [netmon] and [[runtime.shared_mounts]] are accepted whole, with a warning.\n")
	return b.String()
}

// cell makes text safe inside a Markdown table.
func cell(s string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "*", `\*`).Replace(s)
}

func (f *field) annotationNote() string {
	switch {
	case f.valid != "":
		return ", must match a glob of `" + f.valid + "`"
	case f.merge == "append":
		return ", appended to the configured value"
	case f.sep != "":
		return ", a list separated by `" + f.sep + "`"
	case f.typ.Kind() == reflect.Slice:
		return ", a JSON array"
	}
	return ""
}

// DefaultTOML is a configuration.toml with every key commented out at its default.
func DefaultTOML() string {
	var b strings.Builder
	b.WriteString("# configuration.toml with every key at its built-in default.\n# Generated from the schema; see docs/configuration.md.\n")
	for _, s := range schema() {
		fmt.Fprintf(&b, "\n# %s\n[%s]\n", s.doc, s.name)
		for _, f := range s.fields {
			b.WriteString("\n")
			for _, line := range wrap(f.doc, 96) {
				b.WriteString("# " + line + "\n")
			}
			if f.enum != nil || f.ranged {
				b.WriteString("# Value: " + f.what() + ".\n")
			}
			fmt.Fprintf(&b, "#%s = %s\n", f.key, f.tomlDefault())
		}
	}
	return b.String()
}

func (f *field) tomlDefault() string {
	if f.typ.Kind() == reflect.String {
		return describe(f.def)
	}
	return f.def
}

// wrap breaks text into lines of at most width bytes where words allow it.
func wrap(s string, width int) (lines []string) {
	line := ""
	for w := range strings.FieldsSeq(s) {
		if line != "" && len(line)+1+len(w) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += w
	}
	return append(lines, line)
}

// Setting is one key of an effective configuration.
type Setting struct {
	Section string `json:"section"`
	Key     string `json:"key"`
	// Value is a string, a bool, a number (seconds for a time) or a list of strings.
	Value any `json:"value"`
	// Origin says where it was set.
	Origin string `json:"origin"`
}

// Settings lists every key with its value and origin, in the schema's order.
func (c *Config) Settings() []Setting {
	var out []Setting
	v := reflect.ValueOf(c).Elem()
	for _, s := range schema() {
		for _, f := range s.fields {
			val := v.FieldByIndex(f.index).Interface()
			if d, ok := val.(time.Duration); ok {
				val = int64(d / time.Second)
			}
			out = append(out, Setting{Section: f.section, Key: f.key, Value: val, Origin: c.Origin(f.name())})
		}
	}
	return out
}
