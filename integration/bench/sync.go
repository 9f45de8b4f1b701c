// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// volumeSync is how long an update of a ConfigMap takes from the host's first
// write until the host reads what the workload wrote when it heard of it.
const volumeSync = "volume-sync"

// notifyProgram prints the names of what is renamed in a directory that it watches.
const notifyProgram = "github.com/kata-v2/kata/integration/e2e/testdata/probe"

// syncs measures an update of a ConfigMap that a container watches by inotify.
func (e *Env) syncs() Probe {
	var rows []Row
	for _, r := range e.o.runtimes() {
		rows = append(rows, Row{volumeSync, r, Milliseconds})
	}
	return Probe{Rows: rows, Take: func(ctx context.Context, add Add) error {
		program := filepath.Join(e.dir, "tools", "probe")
		if err := buildProgram(ctx, program, notifyProgram); err != nil {
			return err
		}
		for _, row := range rows {
			took, err := e.watched(ctx, row.Runtime, filepath.Dir(program))
			if err != nil {
				return fmt.Errorf("%s: %w", row.Runtime, err)
			}
			add(row, milliseconds(took))
		}
		return nil
	}}
}

// buildProgram builds a static program of this repository.
func buildProgram(ctx context.Context, path, name string) error {
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", path, name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", name, err, out)
	}
	return nil
}

// watched runs a container that watches a volume, updates that once, and returns
// the time until the container's line.
func (e *Env) watched(ctx context.Context, runtime, tools string) (took time.Duration, err error) {
	id := e.id()
	volume := filepath.Join(e.dir, id, "volumes", "kubernetes.io~configmap", "config")
	defer os.RemoveAll(filepath.Join(e.dir, id))
	if err := updateVolume(volume, "1"); err != nil {
		return 0, err
	}
	mount := func(src, dst string) string {
		return "type=bind,src=" + src + ",dst=" + dst + ",options=rbind:rprivate:ro"
	}
	args := e.c.RunArgs(e.o.plugin(runtime), id, e.o.runFlags(runtime, "--rm", "--mount", mount(volume, "/config"), "--mount", mount(tools, "/tools")), "/tools/probe", "notify", "/config")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	cmd := e.c.CtrCmd(ctx, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as in Env.ctr
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return 0, err
	}
	lines := bufio.NewReader(out)
	if err = await(lines, "ready"); err == nil {
		began := time.Now()
		if err = updateVolume(volume, "2"); err == nil {
			err = await(lines, "..data")
		}
		took = time.Since(began)
		_, kerr := e.ctr(ctx, "tasks", "kill", "--signal", "KILL", id)
		err = errors.Join(err, kerr)
	}
	werr := cmd.Wait()
	var exit *exec.ExitError
	if err != nil || werr != nil && !(errors.As(werr, &exit) && exit.ExitCode() == 137) {
		return 0, fmt.Errorf("a container that watches a volume: %w: %s", errors.Join(err, werr), strings.TrimSpace(stderr.String()))
	}
	return took, nil
}

// await reads to a line that begins with a word.
func await(r *bufio.Reader, word string) error {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return fmt.Errorf("no line %q: %w", word, err)
		}
		if f := strings.Fields(line); len(f) > 0 && f[0] == word {
			return nil
		}
	}
}

// updateVolume writes a volume as kubelet does (pkg/volume/util/atomic_writer.go):
// a new directory, the link to it replaced, the old directory removed.
func updateVolume(dir, version string) error {
	old, _ := os.Readlink(filepath.Join(dir, "..data")) // there is none the first time
	if err := os.MkdirAll(filepath.Join(dir, ".."+version), 0o755); err != nil {
		return err
	}
	tmp := filepath.Join(dir, "..data_tmp")
	err := errors.Join(os.WriteFile(filepath.Join(dir, ".."+version, "key"), []byte(version), 0o644),
		os.Symlink(".."+version, tmp), os.Rename(tmp, filepath.Join(dir, "..data")))
	if old == "" {
		return errors.Join(err, os.Symlink("..data/key", filepath.Join(dir, "key")))
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(dir, old)))
}
