// SPDX-License-Identifier: Apache-2.0

package protocols_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// protocVersion is the line of a generated file that names the machine's protoc,
// which says nothing about the rest of the file.
var protocVersion = regexp.MustCompile(`(?m)^//\s+(- )?protoc +v.*$`)

// TestGeneratedCodeIsCurrent generates the code anew, with the plugins that go.mod
// pins, and compares it with what is checked in.
func TestGeneratedCodeIsCurrent(t *testing.T) {
	tools, out := t.TempDir(), t.TempDir()
	command(t, "go", "build", "-o", tools+"/", "google.golang.org/protobuf/cmd/protoc-gen-go", "github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc")
	protos, err := filepath.Glob("*.proto")
	if err != nil || len(protos) == 0 {
		t.Fatalf("no .proto files here: %v", err)
	}
	args := []string{
		"-I", ".", "-I", "/usr/include",
		"--go_out=" + out, "--go_opt=module=github.com/kata-v2/kata",
		"--go-ttrpc_out=" + out, "--go-ttrpc_opt=module=github.com/kata-v2/kata",
	}
	for _, p := range protos {
		args = append(args, filepath.Join("protocols", p))
	}
	cmd := exec.Command("protoc", args...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"))
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("protoc: %v: %s", err, msg)
	}
	command(t, "gofmt", "-w", out)

	fresh, err := filepath.Glob(filepath.Join(out, "protocols", "*", "*.pb.go"))
	if err != nil || len(fresh) == 0 {
		t.Fatalf("protoc made no files: %v", err)
	}
	present, err := filepath.Glob(filepath.Join("*", "*.pb.go"))
	if err != nil {
		t.Fatal(err)
	}
	if len(fresh) != len(present) {
		t.Errorf("%d generated files are checked in, the .proto files make %d: run `make protos` and remove what is left over", len(present), len(fresh))
	}
	for _, path := range fresh {
		name, err := filepath.Rel(filepath.Join(out, "protocols"), path)
		if err != nil {
			t.Fatal(err)
		}
		if generated(t, path) != generated(t, name) {
			t.Errorf("protocols/%s is not what its .proto file makes: run `make protos`", name)
		}
	}
}

func generated(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return protocVersion.ReplaceAllString(string(data), "// protoc")
}

func command(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, msg)
	}
}
