// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/images"
)

// fake is a probe that gives the numbers of a script, one per round.
func fake(row Row, apart bool, values ...float64) Probe {
	i := 0
	return Probe{Rows: []Row{row}, Apart: apart, Take: func(_ context.Context, add Add) error {
		if apart {
			for _, v := range values {
				add(row, v)
			}
			return nil
		}
		add(row, values[i])
		i++
		return nil
	}}
}

func results(t *testing.T, n int, probes ...Probe) []Result {
	t.Helper()
	r := runner{n: n, progress: &bytes.Buffer{}}
	if err := r.run(t.Context(), probes); err != nil {
		t.Fatal(err)
	}
	return r.results(probes)
}

// the first number of each is the discarded warm-up.
func sevenRounds() []Probe {
	return []Probe{
		fake(Row{BaseRow, Bare, Milliseconds}, false, 9999, 100, 110, 90, 100, 100, 100, 100),
		fake(Row{"cold-start", Kata, Milliseconds}, false, 9999, 150, 140, 130, 160, 150, 150, 900),
		fake(Row{"shim-pss", Kata, Mebibytes}, false, 9999, 16, 16, 16, 16, 16, 16, 16),
		fake(Row{"cold-start", Runc, Milliseconds}, false, 9999, 10, 10, 10, 10, 10, 10, 10),
		fake(Row{"idle-cpu", Kata, Percent}, true, 0, 0, 0, 0, 0, 0.1, 0),
	}
}

func TestResults(t *testing.T) {
	got := results(t, 7, sevenRounds()...)
	want := []Result{
		{Name: BaseRow, Runtime: Bare, N: 7, Median: 100, Min: 90, Max: 110, Unit: "ms", Samples: []float64{100, 110, 90, 100, 100, 100, 100}, VS: map[string]float64{}, Spread: map[string][2]float64{}},
		{Name: "cold-start", Runtime: Kata, N: 7, Median: 150, Min: 130, Max: 900, Unit: "ms", Samples: []float64{150, 140, 130, 160, 150, 150, 900}, VS: map[string]float64{BaseRow: 1.5, "runc": 15}, Spread: map[string][2]float64{BaseRow: {1.4444, 1.6}, "runc": {14, 16}}},
		{Name: "cold-start", Runtime: Runc, N: 7, Median: 10, Min: 10, Max: 10, Unit: "ms", Samples: []float64{10, 10, 10, 10, 10, 10, 10}, VS: map[string]float64{BaseRow: 0.1}, Spread: map[string][2]float64{BaseRow: {0.1, 0.1}}},
		{Name: "shim-pss", Runtime: Kata, N: 7, Median: 16, Min: 16, Max: 16, Unit: "MiB", Samples: []float64{16, 16, 16, 16, 16, 16, 16}, VS: map[string]float64{}, Spread: map[string][2]float64{}},
		{Name: "idle-cpu", Runtime: Kata, N: 7, Median: 0, Min: 0, Max: 0.1, Unit: "%", Samples: []float64{0, 0, 0, 0, 0, 0.1, 0}, VS: map[string]float64{}, Spread: map[string][2]float64{}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

func TestMedianOfEven(t *testing.T) {
	if r := summarize(Row{}, []float64{4, 1, 3, 2}); r.Median != 2.5 || r.Min != 1 || r.Max != 4 {
		t.Errorf("%+v", r)
	}
}

func TestNoRatioFromFewSamples(t *testing.T) {
	got := results(t, 6,
		fake(Row{BaseRow, Bare, Milliseconds}, false, 0, 1, 1, 1, 1, 1, 1),
		fake(Row{"cold-start", Kata, Milliseconds}, false, 0, 1, 1, 1, 1, 1, 1))
	for _, r := range got {
		if len(r.VS) > 0 {
			t.Errorf("%s has ratios from %d samples: %v", r.Name, r.N, r.VS)
		}
	}
	var b strings.Builder
	if err := (&Report{Results: got}).WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "no verdict from 6 samples") || strings.Contains(b.String(), "reached") {
		t.Errorf("the table judges:\n%s", b.String())
	}
	if got := judge(results(t, MinSamples, fake(Row{"cold-start", Kata, Milliseconds}, false, 0, 1, 1, 1, 1, 1, 1, 1))); !strings.Contains(got, "bare-boot: no verdict without 7 samples of that") {
		t.Errorf("judged without what it is compared with:\n%s", got)
	}
}

func TestRoundRobin(t *testing.T) {
	var order []string
	probe := func(name string) Probe {
		row := Row{name, Kata, Milliseconds}
		return Probe{Rows: []Row{row}, Take: func(_ context.Context, add Add) error {
			order = append(order, name)
			add(row, 1)
			return nil
		}}
	}
	results(t, 2, probe("a"), probe("b"))
	if got := strings.Join(order, ""); got != "ababab" {
		t.Errorf("the probes ran as %s; want a warm-up and two rounds", got)
	}
}

func TestOnly(t *testing.T) {
	probes := sevenRounds()
	got, err := selectProbes(probes, []string{"shim-pss"})
	if err != nil || len(got) != 2 || got[0].Rows[0].Name != BaseRow || got[1].Rows[0].Name != "shim-pss" {
		t.Errorf("got %d probes, %v; want the base and shim-pss", len(got), err)
	}
	if got, err := selectProbes(probes, nil); err != nil || len(got) != len(probes) {
		t.Errorf("no names: %d probes, %v; want all", len(got), err)
	}
	if _, err := selectProbes(probes, []string{"cold-strat"}); err == nil || !strings.Contains(err.Error(), `"cold-strat"`) || !strings.Contains(err.Error(), `"cold-start"`) {
		t.Errorf("misspelt name: %v; want it and the right ones", err)
	}
}

func TestTable(t *testing.T) {
	var b strings.Builder
	rep := Report{Complete: true, Results: results(t, 7, sevenRounds()...), Facts: []Fact{{"guest kernel", "6.1"}}}
	if err := rep.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	want := `guest kernel       6.1

name        runtime  n  median     min     max  unit       × bare-boot               × runc  × others
bare-boot   bare     7     100    90.0     110  ms
cold-start  kata     7     150     130     900  ms    1.50 (1.44–1.60)  15.00 (14.00–16.00)
cold-start  runc     7    10.0    10.0    10.0  ms    0.10 (0.10–0.10)
shim-pss    kata     7    16.0    16.0    16.0  MiB
idle-cpu    kata     7  0.0000  0.0000  0.1000  %

cold-start       at most 1.2 × bare-boot: missed with 1.5
idle-cpu         at most 0.1 %: reached with 0
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestSizes(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{shimFile: 15_500_000, images.InitrdFile: 8_000_000} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := sizes(Options{Bin: dir, Images: dir})
	if err != nil {
		t.Fatal(err)
	}
	want := "shim-size        at most 13 MB: missed with 15.5\nguest-root-size  at most 16 MB: reached with 8\n"
	if verdict := judge(got); verdict != want {
		t.Errorf("got\n%s\nwant\n%s", verdict, want)
	}
	if _, err := sizes(Options{Bin: dir, Images: filepath.Join(dir, "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without images: %v", err)
	}
}

func TestJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "bench.json")
	if err := (&Report{Results: results(t, 7, sevenRounds()[:2]...), Complete: true}).WriteFile(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Results []map[string]any `json:"results"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"name": "cold-start", "runtime": "kata", "n": 7.0, "median": 150.0, "min": 130.0, "max": 900.0, "unit": "ms",
		"samples": []any{150.0, 140.0, 130.0, 160.0, 150.0, 150.0, 900.0}, "vs": map[string]any{"bare-boot": 1.5}, "vs_spread": map[string]any{"bare-boot": []any{1.4444, 1.6}},
	}
	if len(got.Results) != 2 || !reflect.DeepEqual(got.Results[1], want) {
		t.Errorf("got\n%s\nwant, second, %v", b, want)
	}
	if left, err := filepath.Glob(path + ".*"); err != nil || len(left) > 0 {
		t.Errorf("left beside the file: %v, %v", left, err)
	}
}

// TestBareArguments uses the golden command line of the backend, so that a change
// of the product's machine is noticed here.
func TestBareArguments(t *testing.T) {
	golden, err := os.ReadFile(filepath.Join("..", "..", "hypervisor", "qemu", "testdata", "tcg.args"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := bareArguments(strings.Split(strings.TrimSpace(string(golden)), "\n"), "/k", "/i")
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(got, " ")
	for _, want := range []string{"-machine q35,memory-backend=mem,", "memory-backend-memfd,id=mem,size=256M", "-accel tcg", "-cpu max", "-m 256M ", "-kernel /k -initrd /i", "-bios ", "-smp 1 ", "console=ttyS0 quiet"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is missing in %s", want, line)
		}
	}
	for _, bad := range []string{"vsock", "-device", "-chardev", "-sandbox", "agent.", "/proc/self/fd"} {
		if strings.Contains(line, bad) {
			t.Errorf("%q is in %s", bad, line)
		}
	}
	if _, err := bareArguments([]string{"-machine", "q35"}, "/k", "/i"); err == nil || !strings.Contains(err.Error(), "-accel") {
		t.Errorf("a command without -accel: %v", err)
	}
}

// TestTinyInit runs the program on the host.
func TestTinyInit(t *testing.T) {
	program := tinyInit("hello\n")
	if _, err := elf.NewFile(bytes.NewReader(program)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "hello\n" {
		t.Errorf("read %q, %v", line, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("the init ended: %v; it must sleep, or the guest panics", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	<-ended
}

func TestBareBootReportsTheConsole(t *testing.T) {
	_, err := bootBare(t.Context(), "/bin/sh", []string{"-c", "echo panic: no init; echo bad option >&2"}, nil)
	if err == nil || !strings.Contains(err.Error(), "panic: no init") || !strings.Contains(err.Error(), "bad option") {
		t.Errorf("got %v; want the console and stderr quoted", err)
	}
	up := 0
	took, err := bootBare(t.Context(), "/bin/sh", []string{"-c", "echo x " + bareMarker + "; exec sleep 1000"}, func(pid int) error { up = pid; return nil })
	if err != nil || took.boot <= 0 || took.end <= 0 || up == 0 {
		t.Errorf("got %v, process %d, %v; want the machine ended at its line", took, up, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := bootBare(ctx, "/bin/sleep", []string{"1000"}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestProcesses(t *testing.T) {
	// Named as a shim and as QEMU, one below the other.
	dir := t.TempDir()
	data, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	qemu := filepath.Join(dir, "qemu-system-test")
	if err := os.WriteFile(qemu, data, 0o755); err != nil {
		t.Fatal(err)
	}
	shim := filepath.Join(dir, "containerd-shim-test")
	if err := os.Symlink("/bin/sh", shim); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(shim, "-c", qemu+" -c 'echo up; while :; do sleep 1000; done' & wait", "-id", "one")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	defer func() {
		// As a group: killed one by one, the loop would start another sleep.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}()
	pids := []int{os.Getpid(), cmd.Process.Pid}
	p, err := findPod(pids, "one")
	if err != nil || p.shim != cmd.Process.Pid || p.vmm == 0 || len(p.virtiofsd) > 0 {
		t.Fatalf("got %+v, %v; want shim %d and a VMM", p, err, cmd.Process.Pid)
	}
	if _, err := findPod(pids, "two"); err == nil {
		t.Error("the shim of one was found for two")
	}
	if args := cmdline(p.vmm); len(args) != 3 || args[0] != qemu {
		t.Errorf("the VMM's command line is %q", args)
	}
	if v, err := pss(p.shim); err != nil || v <= 0 || v > 100 {
		t.Errorf("memory of a shell: %v MiB, %v", v, err)
	}
}

// TestCPUTime compares the clock of a process that does nothing with that of one that works.
func TestCPUTime(t *testing.T) {
	start := func(args ...string) int {
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Wait() })
		return cmd.Process.Pid
	}
	idle, busy := start("/bin/sleep", "1000"), start("/bin/sh", "-c", "while :; do :; done")
	var got [2][]float64
	err := watchCPU(t.Context(), 600*time.Millisecond, 3, []int{idle, busy}, func(i int, percent float64) { got[i] = append(got[i], percent) })
	if err != nil || len(got[0]) != 3 || len(got[1]) != 3 {
		t.Fatalf("samples %v, %v; want three each", got, err)
	}
	if used := slices.Max(got[0][1:]); used > 1 {
		t.Errorf("a sleeping process used %v %%", used)
	}
	if used := slices.Max(got[1]); used < 5 || used > 110 {
		t.Errorf("a busy process used %v %%", used)
	}
}
