// SPDX-License-Identifier: Apache-2.0

package house

import (
	"bytes"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const spdx = "// SPDX-License-Identifier: Apache-2.0\n"

// files calls f for every file of the tree that is not built or git's.
func files(t *testing.T, f func(rel string, data []byte)) {
	t.Helper()
	top := root(t)
	n := 0
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != top && (d.Name() == ".git" || strings.HasPrefix(d.Name(), "_")) {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(top, path)
		if err != nil {
			return err
		}
		n++
		f(rel, data)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 20 {
		t.Fatalf("only %d files seen; the walk is wrong", n)
	}
}

// generated is the first line by which Go tools know generated code; some
// generators leave no room for another one above it.
var generated = regexp.MustCompile(`^// Code generated .* DO NOT EDIT\.\n`)

func TestSPDXHeaders(t *testing.T) {
	files(t, func(rel string, data []byte) {
		if strings.HasSuffix(rel, ".go") && !bytes.HasPrefix(data, []byte(spdx)) && !generated.Match(data) {
			t.Errorf("%s does not begin with %q", rel, strings.TrimSpace(spdx))
		}
	})
}

// TestNoTraces finds what ties a file to the machine it was made on: hosts of
// package mirrors and proxies, and paths. Both are read from this machine's
// configuration, so that none has to be written down here either.
func TestNoTraces(t *testing.T) {
	words := append(mirrorHosts(t), machinePaths(t)...)
	if len(words) < 3 {
		t.Fatalf("only %q to look for; reading the configuration went wrong", words)
	}
	t.Logf("looking for %d names", len(words))
	patterns := compile(words)
	files(t, func(rel string, data []byte) {
		for i, p := range patterns {
			if loc := p.FindIndex(data); loc != nil {
				line := 1 + bytes.Count(data[:loc[1]-1], []byte("\n"))
				t.Errorf("%s:%d names %s, of this machine's configuration", rel, line, words[i])
			}
		}
	})
}

// compile makes an expression for each word that does not match inside a longer
// name: neither "my/home/" nor "my.mirror.example".
func compile(words []string) (out []*regexp.Regexp) {
	for _, w := range words {
		tail := `(?:[^\w.-]|\.?$|\.\s)`
		if strings.HasSuffix(w, "/") {
			tail = `\w`
		}
		out = append(out, regexp.MustCompile(`(?m)(?:^|[^\w./-]|//)`+regexp.QuoteMeta(w)+tail))
	}
	return out
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

var anyURL = regexp.MustCompile(`https?://[^\s"'<>\])]+`)

// mirrorHosts are the hosts of the Go module proxies and of apt's sources.
func mirrorHosts(t *testing.T) (out []string) {
	t.Helper()
	text := strings.NewReplacer(",", " ", "|", " ").Replace(goEnv(t, "GOPROXY"))
	for _, glob := range []string{"/etc/apt/sources.list", "/etc/apt/sources.list.d/*", "/etc/apt/mirrors/*"} {
		names, err := filepath.Glob(glob)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil {
				t.Fatal(err)
			}
			text += "\n" + string(b)
		}
	}
	for _, s := range anyURL.FindAllString(text, -1) {
		u, err := url.Parse(s)
		if err != nil || !strings.Contains(u.Hostname(), ".") || strings.HasPrefix(u.Hostname(), "127.") {
			continue
		}
		out = append(out, u.Hostname())
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// generic are directories that many machines have in common.
var generic = []string{"/", "/home", "/root", "/tmp", "/usr", "/usr/src", "/var", "/var/tmp", "/opt", "/srv", "/mnt", "/src", "/go", "/build", "/usr/local"}

// machinePaths are where the sources and Go's caches are.
func machinePaths(t *testing.T) (out []string) {
	t.Helper()
	top := root(t)
	for _, p := range []string{top, filepath.Dir(top), goEnv(t, "GOMODCACHE"), goEnv(t, "GOCACHE")} {
		if filepath.IsAbs(p) && !slices.Contains(generic, p) {
			out = append(out, p+"/")
		}
	}
	return out
}

func TestPatterns(t *testing.T) {
	p := compile([]string{"mirror.example.org", "/xyz/main/", "/xyz/"})
	for text, want := range map[string]bool{
		"see http://mirror.example.org/debian": true, "mirror.example.org": true, "at mirror.example.org.": true,
		"mirror.example.org.uk": false, "my.mirror.example.org": false, "mirror-example-org": false, "my-mirror.example.org": false,
		"in /xyz/main/file.go": true, "\"/xyz/other\"": true, "a/xyz/main": false, "/xyz/": false, "/xyzzy/main/": false,
	} {
		got := slices.ContainsFunc(p, func(r *regexp.Regexp) bool { return r.MatchString(text) })
		if got != want {
			t.Errorf("%q: found %v, want %v", text, got, want)
		}
	}
}
