// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kata-v2/kata/internal/config"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, root, path, text string, mode fs.FileMode) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755))
	must(t, os.WriteFile(filepath.Join(root, path), []byte(text), mode))
}

func read(t *testing.T, root, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, path))
	must(t, err)
	return string(data)
}

// build is what `make build image` leaves.
func build(t *testing.T) string {
	dir := t.TempDir()
	for to, from := range files() {
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(to, binDir) {
			mode = 0o755
		}
		write(t, dir, from, "content of "+from, mode)
	}
	return dir
}

// tree lists the files below a directory.
func tree(t *testing.T, root string) (out []string) {
	t.Helper()
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, strings.TrimPrefix(path, root+"/"))
		}
		return err
	}))
	return out
}

func TestInstallAndUninstall(t *testing.T) {
	from, root := build(t), t.TempDir()
	changed, err := Install(from, root)
	must(t, err)
	want := append(slices.Sorted(maps.Keys(files())), configFile)
	slices.Sort(want)
	if got := tree(t, root); !slices.Equal(got, want) || len(changed) != len(want) {
		t.Errorf("files %q, changed %q; want %q", got, changed, want)
	}
	if info, err := os.Stat(filepath.Join(root, binDir, Programs[0])); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
	if changed, err = Install(from, root); err != nil || len(changed) != 0 {
		t.Errorf("a second time changes %q, %v", changed, err)
	}
	// A new build replaces the file, and who runs the old one keeps it.
	old, err := os.Open(filepath.Join(root, binDir, "kata-ctl"))
	must(t, err)
	defer old.Close()
	write(t, from, "bin/kata-ctl", "new", 0o755)
	if changed, err = Install(from, root); err != nil || !slices.Equal(changed, []string{filepath.Join(root, binDir, "kata-ctl")}) {
		t.Errorf("changed %q, %v", changed, err)
	}
	if data, err := io.ReadAll(old); err != nil || string(data) != "content of bin/kata-ctl" {
		t.Errorf("the open program became %q, %v", data, err)
	}
	write(t, root, filepath.Join(imageDir, "of-others"), "", 0o644)
	must(t, Uninstall(root))
	must(t, Uninstall(root)) // idempotent
	if got := tree(t, root); !slices.Equal(got, []string{filepath.Join(imageDir, "of-others")}) {
		t.Errorf("left %q", got)
	}
}

func TestInstallOfHalfABuild(t *testing.T) {
	from, root := build(t), t.TempDir()
	must(t, os.Remove(filepath.Join(from, "images", "manifest.json")))
	if _, err := Install(from, root); err == nil || !strings.Contains(err.Error(), "manifest.json") {
		t.Errorf("%v; want the missing file's name", err)
	}
}

// The default paths of the configuration are where Install puts things.
func TestDefaultsFindIt(t *testing.T) {
	text := config.DefaultTOML()
	for path := range files() {
		if strings.HasPrefix(path, imageDir) && !strings.HasSuffix(path, ".json") && !strings.Contains(text, `"/`+path+`"`) {
			t.Errorf("/%s is not the default of any key", path)
		}
	}
}

func TestHandler(t *testing.T) {
	for _, c := range []struct {
		name, before string
		after        string // "" is as before
		dropIn       string
	}{
		{"without a configuration", "-", "version = 2\n" + block(t), ""},
		{"empty", "", "version = 2\n" + block(t), ""},
		{"version 2", "version = 2\n[grpc]\n  address = \"x\"\n", "version = 2\n[grpc]\n  address = \"x\"\n" + block(t), ""},
		{"version 2, imports", "imports = [\"/etc/x/*.toml\"]\nversion = 2\n", "imports = [\"/etc/x/*.toml\"]\nversion = 2\n" + block(t), ""},
		{"version 3", "# mine\nversion = 3\n", importLine + "# mine\nversion = 3\n", "version = 3"},
		{"version 3, an earlier build's", oldImportLine + "version = 3\n", importLine + "version = 3\n", "version = 3"},
		{"imported by a glob", "imports = [\"/etc/containerd/conf.d/*.toml\"]\nversion = 3\n", "", "version = 3"},
		{"imported by a relative glob", "imports = [\"conf.d/*.toml\"]\nversion = 3\n", "", "version = 3"},
	} {
		root := t.TempDir()
		if c.before != "-" {
			write(t, root, containerdConfig, c.before, 0o600)
		}
		if changed, err := AddHandler(root); err != nil || !changed {
			t.Errorf("%s: changed %t, %v", c.name, changed, err)
			continue
		}
		want := c.after
		if want == "" {
			want = c.before
		}
		if got := read(t, root, containerdConfig); got != want {
			t.Errorf("%s: %q; want %q", c.name, got, want)
		}
		if c.dropIn == "" {
			if _, err := os.Stat(filepath.Join(root, containerdDropIn)); err == nil {
				t.Errorf("%s: a drop-in, which containerd 1.x would take for the whole CRI", c.name)
			}
		} else if got := read(t, root, containerdDropIn); !strings.Contains(got, c.dropIn+"\n") {
			t.Errorf("%s: drop-in %q", c.name, got)
		}
		if changed, err := AddHandler(root); err != nil || changed {
			t.Errorf("%s, a second time: changed %t, %v", c.name, changed, err)
		}
		if changed, err := RemoveHandler(root); err != nil || !changed {
			t.Errorf("%s: remove: changed %t, %v", c.name, changed, err)
		}
		if changed, err := RemoveHandler(root); err != nil || changed {
			t.Errorf("%s: remove twice: changed %t, %v", c.name, changed, err)
		}
		if got := read(t, root, containerdConfig); strings.TrimPrefix(c.before, "-") != strings.TrimPrefix(got, "version = 2\n") && got != strings.TrimPrefix(c.before, oldImportLine) {
			t.Errorf("%s: after removal %q", c.name, got)
		}
	}
}

// block is what AddHandler adds to a configuration of version 2.
func block(t *testing.T) string {
	t.Helper()
	text, err := handlers.ReadFile("containerd-v2.toml")
	must(t, err)
	_, handler, _ := strings.Cut(string(text), "version = 2\n\n")
	return blockBegin + handler + blockEnd
}

// What an earlier release has installed for version 2 makes place.
func TestHandlerReplacesTheDropIn(t *testing.T) {
	root := t.TempDir()
	write(t, root, containerdConfig, oldImportLine+"version = 2\n", 0o644)
	write(t, root, containerdDropIn, "version = 2\n", 0o644)
	if changed, err := AddHandler(root); err != nil || !changed {
		t.Fatal(changed, err)
	}
	if got := tree(t, root); len(got) != 1 || read(t, root, containerdConfig) != "version = 2\n"+block(t) {
		t.Errorf("files %q, configuration %q", got, read(t, root, containerdConfig))
	}
}

func TestHandlerRefusals(t *testing.T) {
	for before, word := range map[string]string{
		"[grpc]\naddress = \"x\"\n": "config migrate", // version 1
		"version = 9\n":             "config migrate",
		"version = ]":               "config.toml",
		"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\n": "handler of that name",
		"version = 3\nimports = [\"/etc/other.toml\"]":                                    "imports",
	} {
		root := t.TempDir()
		write(t, root, containerdConfig, before, 0o644)
		if _, err := AddHandler(root); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%q: %v; want %q in it", before, err, word)
		}
		if got := tree(t, root); len(got) != 1 || read(t, root, containerdConfig) != before {
			t.Errorf("%q: left %q", before, got)
		}
	}
}

// Label talks to the API server as a pod's service account does.
func TestLabel(t *testing.T) {
	var got []string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		value := body["metadata"].(map[string]any)["labels"].(map[string]any)[NodeLabel]
		text, _ := value.(string)
		got = append(got, r.Method+" "+r.URL.Path+" "+r.Header.Get("Content-Type")+" "+r.Header.Get("Authorization")+" "+text)
		if r.URL.Path == "/api/v1/nodes/unknown" {
			http.Error(w, "no such node", http.StatusNotFound)
		}
	}))
	defer server.Close()
	u, err := url.Parse(server.URL)
	must(t, err)
	t.Setenv("KUBERNETES_SERVICE_HOST", u.Hostname())
	t.Setenv("KUBERNETES_SERVICE_PORT", u.Port())
	secrets := t.TempDir()
	write(t, secrets, "token", "secret\n", 0o600)
	write(t, secrets, "ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})), 0o600)
	c, err := InCluster(secrets)
	must(t, err)
	ctx := context.Background()
	must(t, c.Label(ctx, "n1", true))
	must(t, c.Label(ctx, "n1", false))
	if err := c.Label(ctx, "unknown", true); err == nil || !strings.Contains(err.Error(), "no such node") {
		t.Errorf("%v; want the server's words", err)
	}
	want := []string{
		"PATCH /api/v1/nodes/n1 application/merge-patch+json Bearer secret true",
		"PATCH /api/v1/nodes/n1 application/merge-patch+json Bearer secret ",
		"PATCH /api/v1/nodes/unknown application/merge-patch+json Bearer secret true",
	}
	if !slices.Equal(got, want) {
		t.Errorf("requests %q; want %q", got, want)
	}
}
