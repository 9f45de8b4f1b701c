// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// AnnotationPrefix begins the annotations that set configuration keys; the rest
// is "hypervisor.", "agent.", "runtime." or "factory." and the key.
const AnnotationPrefix = "io.katacontainers.config."

// configPathAnnotation would let a pod choose a whole configuration.
const configPathAnnotation = "io.katacontainers.config_path"

// annotationSections maps the part after AnnotationPrefix to a section.
var annotationSections = map[string]string{
	"hypervisor": "hypervisor.qemu",
	"agent":      "agent.kata",
	"runtime":    "runtime",
	"factory":    "factory",
}

// annotate applies a pod's annotations, in the order of their names. What is
// wrong with one is an InvalidArgument: the pod's author wrote it, not the operator.
func (c *Config) annotate(all map[string]string) ([]Warning, error) {
	if _, ok := all[configPathAnnotation]; ok {
		return nil, fmt.Errorf("annotation %s is refused: a pod cannot choose the configuration; name the file in the runtime's ConfigPath option: %w", configPathAnnotation, errdefs.ErrInvalidArgument)
	}
	var warnings []Warning
	for _, name := range slices.Sorted(maps.Keys(all)) {
		rest, ok := strings.CutPrefix(name, AnnotationPrefix)
		if !ok {
			continue
		}
		noted, err := c.annotateOne(rest, all[name])
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		if noted {
			warnings = append(warnings, Warning{Source: "annotation " + name, Text: "known from Kata Containers and without effect here"})
		}
	}
	return warnings, c.annotatedRoot(all)
}

// annotatedRoot lets an annotated guest root replace the configured one of the
// other kind.
func (c *Config) annotatedRoot(all map[string]string) error {
	const image, initrd = AnnotationPrefix + "hypervisor.image", AnnotationPrefix + "hypervisor.initrd"
	_, hasImage := all[image]
	_, hasInitrd := all[initrd]
	switch {
	case hasImage && hasInitrd:
		return fmt.Errorf("annotation %s excludes %s; set one of them: %w", image, initrd, errdefs.ErrInvalidArgument)
	case hasImage:
		c.QEMU.Initrd = ""
	case hasInitrd:
		c.QEMU.Image = ""
	}
	return nil
}

func (c *Config) annotateOne(name, value string) (noted bool, err error) {
	group, key, _ := strings.Cut(name, ".")
	section, ok := annotationSections[group]
	if !ok {
		return false, fmt.Errorf("unknown; after %s come hypervisor, agent, runtime or factory", AnnotationPrefix)
	}
	f := annotationField(section, key)
	idle, known := upstream[section][key]
	if f == nil && !known {
		return false, fmt.Errorf("unknown; the nearest is %s%s.%s", AnnotationPrefix, group, nearest(key, annotationNames(section)))
	}
	if !c.annotationEnabled(key) {
		return false, fmt.Errorf("not allowed here; an operator allows it by adding %q to enable_annotations in [hypervisor.qemu]", key)
	}
	if f == nil {
		return idle.checkText(key, value)
	}
	return false, c.setAnnotation(f, AnnotationPrefix+name, value)
}

func (c *Config) setAnnotation(f *field, name, value string) error {
	if f.valid != "" {
		if err := c.validPath(f, value); err != nil {
			return err
		}
	}
	if f.merge == "append" {
		old := reflect.ValueOf(c).Elem().FieldByIndex(f.index).String()
		value = strings.TrimSpace(old + " " + value)
	}
	v, err := f.parseText(value)
	if err != nil {
		return err
	}
	if err := f.set(c, v); err != nil {
		return err
	}
	c.origin[f.name()] = "annotation " + name
	return nil
}

// validPath holds a path against the operator's globs. The path is compared as
// it is, so it must be clean: "/a/../b" could otherwise leave a glob's directory.
func (c *Config) validPath(f *field, path string) error {
	globs, _ := reflect.ValueOf(c).Elem().FieldByIndex(lookup(f.section, f.valid).index).Interface().([]string)
	if filepath.IsAbs(path) && filepath.Clean(path) == path {
		for _, g := range globs {
			if ok, _ := filepath.Match(g, path); ok {
				return nil
			}
		}
	}
	return fmt.Errorf("%q matches none of the globs in %s = [%s] of [%s]", path, f.valid, quoteList(globs), f.section)
}

// annotationEnabled matches key against enable_annotations. Unlike Kata
// Containers, an expression must match the whole key: "path" does not allow
// "virtio_fs_daemon_path".
func (c *Config) annotationEnabled(key string) bool {
	for _, p := range c.QEMU.EnableAnnotations {
		re, err := regexp.Compile("^(?:" + p + ")$")
		if err == nil && re.MatchString(key) {
			return true
		}
	}
	return false
}

func annotationField(section, key string) *field {
	for _, s := range schema() {
		for _, f := range s.fields {
			if s.name == section && f.annotation == key {
				return f
			}
		}
	}
	return nil
}

func annotationNames(section string) (out []string) {
	for _, s := range schema() {
		for _, f := range s.fields {
			if s.name == section && f.annotation != "" {
				out = append(out, f.annotation)
			}
		}
	}
	return out
}

// parseList reads a list from an annotation or a default tag.
func (f *field) parseList(s string) (any, error) {
	list := []string{}
	if f.sep != "" && !strings.HasPrefix(s, "[") {
		for e := range strings.SplitSeq(s, f.sep) {
			if e = strings.TrimSpace(e); e != "" {
				list = append(list, e)
			}
		}
		return list, nil
	}
	if err := json.Unmarshal([]byte(s), &list); err != nil || list == nil {
		return nil, fmt.Errorf("%s is a JSON array of strings, not %q", f.key, s)
	}
	return list, nil
}
