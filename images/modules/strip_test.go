// SPDX-License-Identifier: Apache-2.0

package modules

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// compile makes an object with function tracing as kernel modules have it:
// calls of __fentry__ and, in assembler, their list and unwinder tables.
func compile(t *testing.T, extra string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "m.ko")
	src := `static const char info[] __attribute__((section(".modinfo"), used)) = "license=GPL";
int other(int);
int first(int a) { return other(a) + 1; }
int second(int a) { return first(a) * 2; }
__asm__(".pushsection .orc_unwind,\"a\"\n.long 1\n.popsection\n.pushsection .orc_unwind_ip,\"a\"\n.long first - .\n.popsection\n"
	".pushsection __mcount_loc,\"a\"\n.quad first, second\n.popsection\n");
` + extra
	cmd := exec.Command("gcc", "-O1", "-fno-pie", "-fno-asynchronous-unwind-tables", "-pg", "-mfentry", "-c", "-x", "c", "-o", path, "-")
	cmd.Stdin = strings.NewReader(src)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// sections opens a module and tells which of the names it has.
func sections(t *testing.T, module []byte, names ...string) (*elf.File, []string) {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, name := range names {
		if f.Section(name) != nil {
			found = append(found, name)
		}
	}
	return f, found
}

func TestStripReplacesTraceCalls(t *testing.T) {
	module := compile(t, "")
	if n := bytes.Count(module, traceCall); n < 2 {
		t.Fatalf("%d calls in the compiled module: the test's compiler makes none", n)
	}
	out, err := strip(module, false)
	if err != nil {
		t.Fatal(err)
	}
	f, left := sections(t, out, "__mcount_loc", ".rela__mcount_loc", ".orc_unwind", ".orc_unwind_ip", ".comment")
	if len(left) > 0 {
		t.Errorf("sections %v are left", left)
	}
	text, err := f.Section(".text").Data()
	if err != nil {
		t.Fatal(err)
	}
	// first calls other: that relocation and its call stay.
	if got := bytes.Count(text, nop5); got != 2 {
		t.Errorf("%d of 2 functions begin with the no-operation", got)
	}
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	rel, err := f.Section(".rela.text").Data()
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for at := 0; at < len(rel); at += relaSize {
		if n := elf.R_SYM64(f.ByteOrder.Uint64(rel[at+8:])); n > 0 {
			targets = append(targets, symbols[n-1].Name)
		}
	}
	if s := strings.Join(targets, " "); strings.Contains(s, traceSymbol) || !strings.Contains(s, "other") {
		t.Errorf("relocations against %q: want other, no %s", s, traceSymbol)
	}
}

func TestStripKeepsSitesOfAnotherForm(t *testing.T) {
	module := compile(t, `__asm__(".text\njmp __fentry__\n");`)
	out, err := strip(module, false)
	if err != nil {
		t.Fatal(err)
	}
	f, left := sections(t, out, "__mcount_loc")
	if len(left) != 1 {
		t.Error("the list is gone though a site could not be replaced")
	}
	text, err := f.Section(".text").Data()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text, nop5) {
		t.Error("some sites were replaced, others not")
	}
}
