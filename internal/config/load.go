// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// EnvFile names the environment variable that holds a configuration file's path.
const EnvFile = "KATA_CONF_FILE"

// searchPaths are tried in order when nothing names a file.
var searchPaths = []string{
	"/etc/kata-containers/configuration.toml",
	"/usr/share/defaults/kata-containers/configuration.toml",
}

// SearchPaths are the files that are tried, in order, when nothing names one.
func SearchPaths() []string { return slices.Clone(searchPaths) }

// LoadOptions says where a configuration comes from.
type LoadOptions struct {
	// Path is containerd's ConfigPath option; it must exist. When empty,
	// $KATA_CONF_FILE is used, then the first that exists of the files in /etc
	// and /usr/share/defaults, then the built-in defaults.
	Path string
	// Body replaces the file and its drop-ins when it is not nil (containerd's config_body).
	Body []byte
	// Annotations are all annotations of the pod; those that do not begin with
	// io.katacontainers.config are skipped.
	Annotations map[string]string
}

// Warning is something that does not stop a start and that an operator should know.
type Warning struct {
	// Source is the file or annotation; Line is 0 when there is none.
	Source string
	Line   int
	Text   string
}

func (w Warning) String() string {
	if w.Line == 0 {
		return w.Source + ": " + w.Text
	}
	return fmt.Sprintf("%s:%d: %s", w.Source, w.Line, w.Text)
}

// Load reads the configuration: the file, then config.d/*.toml beside it in
// lexical order, then the annotations. Errors name file, line, key and what
// would be right. It does not look at the files that the keys name; CheckFiles does.
func Load(o LoadOptions) (*Config, []Warning, error) {
	c := defaults()
	var warnings []Warning
	if o.Body != nil {
		w, err := c.read("config_body", o.Body)
		if err != nil {
			return nil, nil, err
		}
		warnings = append(warnings, w...)
	} else {
		w, err := c.readFiles(o.Path)
		if err != nil {
			return nil, nil, err
		}
		warnings = append(warnings, w...)
	}
	if err := c.validate(); err != nil {
		return nil, nil, err
	}
	w, err := c.annotate(o.Annotations)
	if err != nil {
		return nil, nil, err
	}
	if len(o.Annotations) > 0 {
		if err := c.validate(); err != nil {
			return nil, nil, err
		}
	}
	return c, append(warnings, w...), nil
}

func (c *Config) read(name string, data []byte) ([]Warning, error) {
	entries, err := parse(name, data)
	if err != nil {
		return nil, err
	}
	return apply(c, name, entries)
}

func (c *Config) readFiles(path string) ([]Warning, error) {
	path, data, err := mainFile(path)
	if err != nil || path == "" {
		return nil, err
	}
	c.path = path
	files := []string{path}
	warnings, err := c.read(path, data)
	if err != nil {
		return nil, err
	}
	drops, err := dropIns(filepath.Join(filepath.Dir(path), "config.d"))
	if err != nil {
		return nil, err
	}
	for _, d := range drops {
		data, err := readFile(d)
		if err != nil {
			return nil, fmt.Errorf("configuration drop-in: %w", err)
		}
		w, err := c.read(d, data)
		if err != nil {
			return nil, err
		}
		warnings = append(warnings, w...)
		files = append(files, d)
	}
	c.files = files
	return warnings, nil
}

// mainFile finds the file; an empty path means that there is none.
func mainFile(path string) (string, []byte, error) {
	why := "runtime option ConfigPath"
	if path == "" {
		path, why = os.Getenv(EnvFile), "environment variable "+EnvFile
	}
	if path != "" {
		data, err := readFile(path)
		if err != nil {
			return "", nil, fmt.Errorf("configuration file named by %s: %w", why, err)
		}
		return path, data, nil
	}
	for _, p := range searchPaths {
		data, err := readFile(p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", nil, fmt.Errorf("configuration file: %w", err)
		}
		return p, data, nil
	}
	return "", nil, nil
}

// readFile reads at most one byte more than parse accepts.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

func dropIns(dir string) ([]string, error) {
	list, err := os.ReadDir(dir) // sorted by name
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration drop-ins: %w", err)
	}
	var out []string
	for _, e := range list {
		if !e.IsDir() && strings.HasSuffix(e.Name(), ".toml") && !strings.HasPrefix(e.Name(), ".") {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}

// validate checks what one key alone cannot show, and settles image against initrd.
func (c *Config) validate() error {
	q := &c.QEMU
	if q.Image != "" && q.Initrd != "" {
		_, set := c.origin["hypervisor.qemu.initrd"]
		if set {
			return c.wrong("image", "excludes initrd, which is set in "+c.Origin("hypervisor.qemu.initrd")+`; set one of them to ""`)
		}
		q.Initrd = ""
	}
	// Its default gives way to what excludes it.
	if _, set := c.origin["factory.enable_template"]; !set && (q.EnableHugePages || q.EnableMemPrealloc) {
		c.Factory.EnableTemplate = false
	}
	switch {
	case q.Path == "":
		return c.wrong("path", "must name QEMU, for example /usr/bin/qemu-system-x86_64")
	case q.Kernel == "":
		return c.wrong("kernel", "must name the guest kernel")
	case q.Image == "" && q.Initrd == "":
		return c.wrong("initrd", "is empty and so is image; one of them must name the guest's root")
	case q.DefaultMaxVCPUs != 0 && q.DefaultMaxVCPUs < q.DefaultVCPUs:
		return c.wrong("default_maxvcpus", fmt.Sprintf("is %d, less than default_vcpus = %d", q.DefaultMaxVCPUs, q.DefaultVCPUs))
	case c.Factory.EnableTemplate && q.EnableHugePages:
		return c.wrong("enable_hugepages", "excludes enable_template, which is set in "+c.Origin("factory.enable_template"))
	case c.Factory.EnableTemplate && q.EnableMemPrealloc:
		return c.wrong("enable_mem_prealloc", "excludes enable_template, which is set in "+c.Origin("factory.enable_template"))
	case c.Runtime.StateDir == "":
		return fmt.Errorf("%s: [runtime] state_dir must name a directory", c.Origin("runtime.state_dir"))
	case (q.RxRateLimiterMaxRate > 0 || q.TxRateLimiterMaxRate > 0) && c.Runtime.InternetworkingModel != "tcfilter":
		key := "rx_rate_limiter_max_rate"
		if q.RxRateLimiterMaxRate == 0 {
			key = "tx_rate_limiter_max_rate"
		}
		return c.wrong(key, fmt.Sprintf("needs internetworking_model = \"tcfilter\", not %q", c.Runtime.InternetworkingModel))
	case c.Runtime.DisableNewNetNS && c.Runtime.InternetworkingModel != "none":
		return fmt.Errorf("%s: [runtime] disable_new_netns needs internetworking_model = \"none\", not %q",
			c.Origin("runtime.disable_new_netns"), c.Runtime.InternetworkingModel)
	case len(c.Runtime.Experimental) > 0:
		return fmt.Errorf("%s: [runtime] experimental names %q; this build has no experimental features",
			c.Origin("runtime.experimental"), c.Runtime.Experimental[0])
	}
	return c.validateLists()
}

func (c *Config) validateLists() error {
	for _, p := range c.QEMU.EnableAnnotations {
		if _, err := regexp.Compile(p); err != nil {
			return c.wrong("enable_annotations", fmt.Sprintf("holds %q, not a regular expression: %v", p, err))
		}
	}
	for key, globs := range map[string][]string{
		"valid_hypervisor_paths":       c.QEMU.ValidHypervisorPaths,
		"valid_virtio_fs_daemon_paths": c.QEMU.ValidVirtioFSDaemonPaths,
	} {
		for _, g := range globs {
			if _, err := filepath.Match(g, "/"); err != nil || !filepath.IsAbs(g) {
				return c.wrong(key, fmt.Sprintf("holds %q, not a glob of absolute paths", g))
			}
		}
	}
	if i := slices.IndexFunc(c.Runtime.SandboxBindMounts, func(p string) bool { return !filepath.IsAbs(p) }); i >= 0 {
		return fmt.Errorf("%s: [runtime] sandbox_bind_mounts holds %q, not an absolute path",
			c.Origin("runtime.sandbox_bind_mounts"), c.Runtime.SandboxBindMounts[i])
	}
	return nil
}

func (c *Config) wrong(key, text string) error {
	return fmt.Errorf("%s: [hypervisor.qemu] %s %s", c.Origin("hypervisor.qemu."+key), key, text)
}
