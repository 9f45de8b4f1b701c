// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// CreateSandbox sets the pod as a whole up: kernel modules, name, DNS, shared
// storage, guest hooks. On an error it can be called again.
func (p *Pod) CreateSandbox(ctx context.Context, req *agentpb.CreateSandboxRequest) error {
	p.mu.Lock()
	active := p.active
	p.mu.Unlock()
	if active {
		return fault.New(fault.AlreadyExists, "the sandbox exists already: one guest, one sandbox")
	}
	for _, m := range req.KernelModules {
		if err := p.cfg.Modules.LoadByName(m.Name, m.Parameters); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(p.cfg.RunDir, "sandbox"), 0o755); err != nil {
		return err
	}
	if req.Hostname != "" {
		if err := unix.Sethostname([]byte(req.Hostname)); err != nil {
			return fault.New(fault.InvalidArgument, "hostname %q: %w", req.Hostname, err)
		}
	}
	if err := p.writeResolvConf(req.Dns); err != nil {
		return err
	}
	hooks, err := guestHooks(req.GuestHookPath)
	if err != nil {
		return err
	}
	var undo undo
	for _, s := range req.Storages {
		mp, err := p.cfg.Storage.Add(ctx, s, "")
		if err != nil {
			return errors.Join(err, undo.run())
		}
		undo.add(func() error { return p.cfg.Storage.Remove(mp) })
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active, p.hooks = true, hooks
	return nil
}

// writeResolvConf writes the pod's resolv.conf. Entries are lines of such a
// file; a bare address is a name server.
func (p *Pod) writeResolvConf(dns []string) error {
	if len(dns) == 0 {
		return nil
	}
	var b strings.Builder
	for _, line := range dns {
		if _, err := netip.ParseAddr(line); err == nil {
			b.WriteString("nameserver ")
		}
		b.WriteString(line + "\n")
	}
	path := filepath.Join(p.cfg.RunDir, "sandbox", "resolv.conf")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("dns: %w", err)
	}
	return nil
}

// guestHooks finds executables in dir/{prestart,poststart,poststop}: hooks that
// come with the guest image and run for every container.
func guestHooks(dir string) (specs.Hooks, error) {
	var h specs.Hooks
	if dir == "" {
		return h, nil
	}
	for name, dst := range map[string]*[]specs.Hook{"prestart": &h.CreateRuntime, "poststart": &h.Poststart, "poststop": &h.Poststop} {
		sub := filepath.Join(dir, name)
		entries, err := os.ReadDir(sub)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return h, fmt.Errorf("guest_hook_path: %w", err)
		}
		for _, e := range entries {
			st, err := e.Info()
			if err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
				continue
			}
			*dst = append(*dst, specs.Hook{Path: filepath.Join(sub, e.Name()), Args: []string{e.Name(), name}})
		}
	}
	return h, nil
}
