// SPDX-License-Identifier: Apache-2.0

package images

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// release runs the script of `make release` on a build and returns the archive's name.
func release(t *testing.T, build, kernel string) (archive string, err error) {
	t.Helper()
	cache, out := t.TempDir(), t.TempDir()
	write(t, filepath.Join(cache, "crun", "version"), "1.2.3\n")
	cmd := exec.Command("../scripts/release.sh", build, kernel, out, "name")
	cmd.Env = append(os.Environ(), "KATA_CACHE="+cache)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	if left, _ := filepath.Glob(filepath.Join(out, "*")); len(left) != 2 {
		t.Errorf("the script leaves %v: want the archive and its digests", left)
	}
	return filepath.Join(out, "name.tar.zst"), nil
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// digests reads what sha256sum prints: digests by file name.
func digests(t *testing.T, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		sum, name, ok := strings.Cut(lines.Text(), "  ")
		if !ok {
			t.Fatalf("%s: line %q: want a digest, two spaces, a name", path, lines.Text())
		}
		sums[name] = sum
	}
	return sums
}

// have are the digests of all files below dir but one.
func have(t *testing.T, dir, but string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if name, _ := filepath.Rel(dir, path); err == nil && d.Type().IsRegular() && name != but {
			data, readErr := os.ReadFile(path)
			err, sums[name] = readErr, fmt.Sprintf("%x", sha256.Sum256(data))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

// TestRelease: the archive holds a build that `kata-ctl install --from` takes, the
// kernel's sources by name and the digest of each file; equal builds are equal
// archives, and an incomplete build is none.
func TestRelease(t *testing.T) {
	build, kernel := t.TempDir(), t.TempDir()
	dir, _ := set(t)
	if err := os.CopyFS(filepath.Join(build, "images"), os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	programs := []string{"bin/containerd-shim-kata-v2", "bin/kata-ctl", "bin/kata-agent"}
	for _, p := range programs {
		write(t, filepath.Join(build, p), "program "+p)
	}
	write(t, filepath.Join(kernel, "config"), "CONFIG_X=y\n")
	write(t, filepath.Join(kernel, "version"), "6.12.1-1\n")
	archive, err := release(t, build, kernel)
	if err != nil {
		t.Fatal(err)
	}

	root := t.TempDir()
	if out, err := exec.Command("tar", "--zstd", "-C", root, "-xf", archive).CombinedOutput(); err != nil {
		t.Fatalf("unpack: %v: %s", err, out)
	}
	root = filepath.Join(root, "name")
	sums := digests(t, filepath.Join(root, "SHA256SUMS"))
	if files := have(t, root, "SHA256SUMS"); !maps.Equal(sums, files) {
		t.Errorf("SHA256SUMS is %v; the archive holds %v", sums, files)
	}
	for _, name := range append(programs, "LICENSE", "images/kernel.config", "images/"+KernelFile, "images/"+InitrdFile) {
		if sums[name] == "" {
			t.Errorf("the archive lacks %s", name)
		}
	}
	m, err := ReadManifest(filepath.Join(root, "images", ManifestFile))
	if err == nil {
		err = m.Verify(filepath.Join(root, "images"))
	}
	if err != nil {
		t.Error(err)
	}
	sources, err := os.ReadFile(filepath.Join(root, "SOURCES"))
	if err != nil || !strings.Contains(string(sources), "6.12.1-1") || !strings.Contains(string(sources), "crun 1.2.3") {
		t.Errorf("SOURCES: %v: %s; want the versions of the kernel's and crun's packages", err, sources)
	}

	beside := digests(t, strings.TrimSuffix(archive, ".tar.zst")+".sha256")
	if sum := have(t, filepath.Dir(archive), "name.sha256")["name.tar.zst"]; beside["name.tar.zst"] != sum {
		t.Errorf("the archive's digest is %s; beside it is %s", sum, beside["name.tar.zst"])
	}
	again, err := release(t, build, kernel)
	if err != nil {
		t.Fatal(err)
	}
	first, _ := os.ReadFile(archive)
	if second, err := os.ReadFile(again); err != nil || !bytes.Equal(first, second) {
		t.Errorf("a second archive of the same build differs (%v)", err)
	}

	if err := os.Remove(filepath.Join(build, programs[2])); err != nil {
		t.Fatal(err)
	}
	if _, err := release(t, build, kernel); err == nil || !strings.Contains(err.Error(), programs[2]) {
		t.Errorf("a build without an agent: got %v; want an error that names %s", err, programs[2])
	}
}
