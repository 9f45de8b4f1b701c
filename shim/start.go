// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// envMaxVersion announces that JSON is understood as an answer. It holds 2 from
// containerd 1.7 on, whatever the release understands; see docs/containerd.md.
const envMaxVersion = "MAX_SHIM_VERSION"

// envDaemon marks the process that start leaves behind; its descriptors are
// listed below.
const envDaemon = "KATA_SHIM_DAEMON"

const (
	daemonListenFD = 3
	daemonLockFD   = 4
	daemonParamsFD = 5
	daemonMountsFD = 6 // containerd's mount namespace
)

// daemonParams are what the daemon inherits from start, as JSON in a memory file.
type daemonParams struct {
	Namespace, ID, Group, Key, Bundle, TTRPCAddress, StateDir string
	Debug                                                     bool
	OldStats                                                  bool // containerd is 1.6 or older
	Config                                                    config.LoadOptions
	Notes                                                     []string
}

// start finds or makes the daemon of the container's pod and prints where it listens.
func start(ctx context.Context, p *params, stdout io.Writer) error {
	spec, err := readSpec(p.Bundle)
	if err != nil {
		// A sandbox made through the Sandbox API has no specification yet.
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	group := p.ID
	opts, err := loadOptions(p.Options)
	if err != nil {
		return err
	}
	lo, notes := opts.config, opts.notes
	if spec != nil {
		if group, err = groupOf(spec, p.ID); err != nil {
			return err
		}
		lo.Annotations = spec.Annotations
	}
	cfg, warnings, err := config.Load(lo)
	if err != nil {
		return err
	}
	if err := sandbox.CheckConfig(cfg); err != nil {
		return err
	}
	for _, w := range warnings {
		notes = append(notes, w.String())
	}
	d := daemonParams{
		Namespace: p.Namespace, ID: p.ID, Group: group, Bundle: p.Bundle, TTRPCAddress: p.TTRPCAddress,
		Key:      ledger.Key(filepath.Join(filepath.Dir(p.Bundle), group)),
		StateDir: cfg.Runtime.StateDir, Debug: p.Debug || cfg.Runtime.EnableDebug, Config: lo, Notes: notes,
		OldStats: p.form() == bareAddress,
	}
	address, err := findOrFork(ctx, d)
	if err != nil {
		return err
	}
	// containerd ≤ 1.7 reads this file after its own restart, and delete uses it.
	if err := os.WriteFile(filepath.Join(p.Bundle, "address"), []byte(address), 0o600); err != nil {
		return fmt.Errorf("address file: %w", err)
	}
	return answer(p, address, spec == nil, mountCapabilities(cfg), stdout)
}

// findOrFork returns the address of the pod's daemon. The state directory is
// locked meanwhile, so two containers of one pod cannot both make it.
func findOrFork(ctx context.Context, d daemonParams) (string, error) {
	unlock, err := lockDir(d.StateDir)
	if err != nil {
		return "", err
	}
	defer unlock()
	socket := filepath.Join(d.StateDir, d.Key, "shim.sock")
	address := "unix://" + socket
	l, err := ledger.Create(d.StateDir, d.Key, ledger.Meta{Sandbox: d.Group, Namespace: d.Namespace, Bundle: d.Bundle})
	if errors.Is(err, ledger.ErrExists) {
		report, rerr := ledger.Reap(ctx, d.StateDir, d.Key)
		switch {
		case errors.Is(rerr, ledger.ErrAlive):
			if d.Group == d.ID {
				return "", fmt.Errorf("a sandbox with id %s is running already", d.ID)
			}
			return address, nil
		case rerr != nil:
			return "", fmt.Errorf("clean up a former sandbox %s: %w (%v)", d.Group, rerr, report)
		}
		l, err = ledger.Create(d.StateDir, d.Key, ledger.Meta{Sandbox: d.Group, Namespace: d.Namespace, Bundle: d.Bundle})
	}
	if err != nil {
		return "", err
	}
	if err := fork(l, socket, d); err != nil {
		return "", errors.Join(err, l.Close())
	}
	return address, l.Release()
}

// lockDir takes an exclusive lock on a directory, which is made when missing.
func lockDir(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("runtime.state_dir: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("runtime.state_dir: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// fork leaves the daemon behind, in a mount namespace of its own. It inherits
// the listening socket, so containerd can connect at once, and the ledger's lock.
func fork(l *ledger.Ledger, socket string, d daemonParams) error {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("shim socket: %w", err)
	}
	ln.SetUnlinkOnClose(false) // the daemon's copy goes on; the directory is removed with the ledger
	defer ln.Close()
	if err := os.Chmod(socket, 0o600); err != nil {
		return fmt.Errorf("shim socket: %w", err)
	}
	lf, err := ln.File()
	if err != nil {
		return fmt.Errorf("shim socket: %w", err)
	}
	defer lf.Close()
	pf, err := memoryFile(d)
	if err != nil {
		return err
	}
	defer pf.Close()
	mounts, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return fmt.Errorf("the host's mount namespace: %w", err)
	}
	defer mounts.Close()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("own path: %w", err)
	}
	cmd := exec.Command(self, "-namespace", d.Namespace, "-id", d.Group)
	cmd.Dir = d.Bundle
	cmd.Env = append(os.Environ(), envDaemon+"=1", "GOMAXPROCS=2")
	cmd.ExtraFiles = []*os.File{lf, l.LockFile(), pf, mounts}
	// Without Unshareflags: Go would make the new namespace's mounts private,
	// and what the host mounts later must still arrive.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	return cmd.Process.Release()
}

func memoryFile(v any) (*os.File, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("daemon parameters: %w", err)
	}
	fd, err := unix.MemfdCreate("kata-shim-params", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("daemon parameters: %w", err)
	}
	f := os.NewFile(uintptr(fd), "params")
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("daemon parameters: %w", err)
	}
	return f, nil
}

// answerForm is how containerd wants to be told where the daemon listens.
type answerForm int

const (
	bareAddress    answerForm = iota // up to 1.6
	jsonResult                       // 1.7 to 2.2, which announce a version
	protobufResult                   // 2.3 and newer
)

func (p *params) form() answerForm {
	switch {
	case p.Protobuf:
		return protobufResult
	case os.Getenv(envMaxVersion) != "":
		return jsonResult
	}
	return bareAddress
}

// answer tells containerd where the daemon listens: protobuf for 2.3 and newer,
// JSON for those that announce a version (1.7 to 2.2), the bare address for older
// ones. A sandbox of the Sandbox API is made by 2.0 and newer only; to those of
// 2.0 to 2.2 version 3 says that the sandbox's containers may come here without
// another start (containerd core/runtime/v2/shim_manager.go).
func answer(p *params, address string, sandboxAPI bool, mounts *types.MountCapabilities, w io.Writer) error {
	var out []byte
	var err error
	switch {
	case p.Protobuf:
		result := &bootapi.BootstrapResult{Version: 3, Address: address, Protocol: "ttrpc"}
		if err = result.AddExtension(mounts); err == nil {
			out, err = proto.Marshal(result)
		}
	case os.Getenv(envMaxVersion) != "":
		version := 2
		if sandboxAPI {
			version = 3
		}
		out, err = json.Marshal(map[string]any{"version": version, "address": address, "protocol": "ttrpc"})
	default:
		out = []byte(address)
	}
	if err == nil {
		_, err = w.Write(out)
	}
	if err != nil {
		return fmt.Errorf("answer containerd: %w", err)
	}
	return nil
}

// mountCapabilities says which root filesystems containerd hands over without
// having mounted anything itself (containerd docs/shim-capabilities.md): layers of
// EROFS, and the overlay or bind mount that names them by their place in the list.
// What is written is an ext4 that containerd makes (mkfs/) and hands over. None of
// it when root filesystems are to be shared; saying so spares containerd 2.4 asking
// with -info.
func mountCapabilities(c *config.Config) *types.MountCapabilities {
	if !sandbox.MountsBlock(c) {
		return &types.MountCapabilities{}
	}
	return &types.MountCapabilities{Types: []string{"erofs"}, Transforms: []string{"format", "mkdir"}}
}

// annotationMounts is where containerd 2.1 to 2.3 finds the same (containerd
// core/runtime/v2/task_manager.go).
const annotationMounts = "containerd.io/runtime-allow-mounts"

// allowedMounts is the annotation's value.
func allowedMounts(m *types.MountCapabilities) string {
	all := slices.Clone(m.Types)
	for _, t := range m.Transforms {
		all = append(all, t+"/*")
	}
	return strings.Join(all, ",")
}
